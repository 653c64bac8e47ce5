// One update of a solver over the whole state; the formula is in admfast/ops/update/step.py.
// Plain structs of pointers and sizes: no torch header, so that any backend can take them.
#pragma once

#include <cstdint>

namespace admfast {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Columns of the packed table, in the order of COLUMNS in admfast/ops/update/step.py.
struct SamplerRow {
  float k_x, k_out, k_pre, k_post, l0, l1, a, a_s, b, d[3], k_mean, k_z, mix, clip, save, p_x, p_0, push_slot;
};
constexpr int kRowColumns = 20;
static_assert(sizeof(SamplerRow) == kRowColumns * sizeof(float), "SamplerRow must match the packed table");

// A tensor [N, C, P] with any strides (in elements).
struct Strided {
  const void* data = nullptr;
  int64_t n = 0, c = 0, p = 0;
  Type type = Type::kFloat32;
};

// A whole number that is read on the device of the update: *at + offset, or only offset if `at` is null.
struct Counter {
  const void* at = nullptr;
  bool wide = false;  // int64, else int32
  int64_t offset = 0;
};

struct SamplerArgs {
  int64_t N, C, P;          // images, channels, positions
  float* x;                 // [N, C, P] contiguous, read and written
  float* x0;                // [N, C, P] contiguous, written
  float* saved;             // [N, C, P] or null
  float* history;           // [3, N, C, P] or null
  Strided out, out2;        // [N, C or 2C, P] of one type; out2.data may be null
  Strided grad;             // [N, C, P] float32; data may be null
  bool has_variance;        // out has 2C channels
  const uint64_t* seeds;    // [N], used if noise is null; may be null
  const float* noise;       // [N, C, P] contiguous or null
  const float* table;       // [rows, kRowColumns]
  int64_t rows;
  Counter row, noise_row;
  uint32_t stream;
};

// The CPU loops of one instruction set.
struct SamplerLoops {
  const char* name;
  // Positions [begin, end) of image n, in all channels.
  void (*update)(const SamplerArgs& args, const SamplerRow& row, uint32_t noise_row, int64_t n, int64_t begin,
                 int64_t end);
  // Standard normals for elements [begin, end) of one image.
  void (*normal)(uint64_t seed, uint32_t row, uint32_t stream, int64_t begin, int64_t end, float* z);
};
extern const SamplerLoops sampler_loops_generic, sampler_loops_avx2, sampler_loops_avx512;

// The widest loops for the instruction set of cpu_isa.h.
const SamplerLoops& sampler_loops();

}  // namespace admfast
