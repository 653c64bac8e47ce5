// One update of a solver over the whole state; the formula is in admfast/ops/sampler_step.py.
// A plain struct of pointers and sizes: no torch header, so that any backend can take it.
#pragma once

#include <cstdint>

namespace admfast {

enum class OutType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Columns of the packed table, in the order of COLUMNS in admfast/ops/sampler_step.py.
struct SamplerRow {
  float k_x, k_out, k_pre, k_post, l0, l1, a, a_s, b, d[3], k_mean, k_z, mix, clip, save, push_slot;
};
static_assert(sizeof(SamplerRow) == 18 * sizeof(float), "SamplerRow must match the packed table");

// A tensor [N, C, P] with any strides (in elements).
struct Strided {
  const void* data = nullptr;
  int64_t n = 0, c = 0, p = 0;
};

struct SamplerArgs {
  int64_t N, C, P;             // images, channels, positions
  float* x;                    // [N, C, P] contiguous, updated
  float* x0;                   // [N, C, P], written
  float* saved;                // [N, C, P] or null
  float* history;              // [3, N, C, P] or null
  Strided out, out2;           // [N, C or 2C, P]; out2.data may be null
  Strided grad;                // [N, C, P] float32; may be null
  OutType out_type;
  bool has_variance;           // out has 2C channels
  const uint64_t* seeds;       // [N], used where noise is null
  const float* noise;          // [N, C, P] contiguous or null
  uint32_t noise_row, stream;
};

// Elements [begin, end) of image n, in logical order.
void sampler_step_range(const SamplerArgs& args, const SamplerRow& row, int64_t n, int64_t begin, int64_t end);

// Standard normals for elements [begin, end) of one image; begin must be a multiple of four.
void normal_range(uint64_t seed, uint32_t row, uint32_t stream, int64_t begin, int64_t end, float* z);

}  // namespace admfast
