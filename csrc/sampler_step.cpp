#include "sampler_step.h"

#include <algorithm>

#include "noise.h"

// One binary for every x86 machine: the loader picks the widest version. Elsewhere the plain one is built.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define ADMFAST_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define ADMFAST_CLONES
#endif

namespace admfast {
namespace {

constexpr int64_t kChunk = 512;  // elements worked on at a time: all buffers stay in the first-level cache

// e^v: 2^n * P(r) with a fit of degree 6 (relative error 2e-9 before rounding); 0 below, inf above the range.
inline float exp_poly(float v) {
  const float clamped = std::min(std::max(v, -87.0f), 88.0f);
  const float n = std::nearbyint(clamped * 0x1.715476p+0f);
  const float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6dd98cp-10f;
  p = p * r + 0x1.126fbap-7f;
  p = p * r + 0x1.55541cp-5f;
  p = p * r + 0x1.555404p-3f;
  p = p * r + 0x1.0p-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  const float result = p * scale;
  return v < -87.0f ? 0.0f : (v > 88.0f ? INFINITY : (v == v ? result : v));
}

inline float bfloat16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float float16_to_float(uint16_t h) {
  // Through a product with 2^112, which makes normals of subnormals without a branch.
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f = f * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= (h & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <typename T, typename Convert>
inline void gather(const T* data, int64_t stride, int64_t count, float* to, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(data[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(data[i * stride]);
  }
}

// Logical elements [begin, begin + count) of image n, from channel offset `channel0` on, as float.
inline void load(const Strided& from, OutType type, int64_t n, int64_t channel0, int64_t P, int64_t begin,
                 int64_t count, float* to) {
  while (count > 0) {
    const int64_t channel = begin / P, position = begin % P;
    const int64_t here = std::min(count, P - position);
    const int64_t offset = n * from.n + (channel0 + channel) * from.c + position * from.p;
    if (type == OutType::kFloat32) {
      gather(static_cast<const float*>(from.data) + offset, from.p, here, to, [](float v) { return v; });
    } else if (type == OutType::kBFloat16) {
      gather(static_cast<const uint16_t*>(from.data) + offset, from.p, here, to, bfloat16_to_float);
    } else {
      gather(static_cast<const uint16_t*>(from.data) + offset, from.p, here, to, float16_to_float);
    }
    begin += here;
    to += here;
    count -= here;
  }
}

}  // namespace

ADMFAST_CLONES
void normal_range(uint64_t seed, uint32_t row, uint32_t stream, int64_t begin, int64_t end, float* z) {
  constexpr int64_t kBlocks = 64;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t start = begin; start < end; start += 4 * kBlocks) {
    uint32_t r[4][kBlocks];
    const uint64_t first = static_cast<uint64_t>(start) / 4;
    for (int64_t j = 0; j < kBlocks; ++j) {
      const uint64_t block = first + static_cast<uint64_t>(j);
      uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), row, stream};
      philox4x32_10(c, k0, k1);
      for (int w = 0; w < 4; ++w) r[w][j] = c[w];
    }
    float values[4][kBlocks];
    for (int64_t j = 0; j < kBlocks; ++j) box_muller(r[0][j], r[1][j], values[0][j], values[1][j]);
    for (int64_t j = 0; j < kBlocks; ++j) box_muller(r[2][j], r[3][j], values[2][j], values[3][j]);
    const int64_t here = std::min<int64_t>(4 * kBlocks, end - start);
    for (int64_t i = 0; i < here; ++i) z[start - begin + i] = values[i % 4][i / 4];
  }
}

ADMFAST_CLONES
void sampler_step_range(const SamplerArgs& args, const SamplerRow& row, int64_t n, int64_t begin, int64_t end) {
  float mean[kChunk], second[kChunk], log_var[kChunk], g[kChunk], z[kChunk], next[kChunk], used[kChunk];
  const int64_t image = args.C * args.P;
  const bool need_sigma = (row.k_mean != 0.0f && args.grad.data) || row.k_z != 0.0f;
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t count = std::min(kChunk, end - start);
    float* x = args.x + n * image + start;
    float* x0 = args.x0 + n * image + start;
    load(args.out, args.out_type, n, 0, args.P, start, count, mean);
    if (args.out2.data) {
      load(args.out2, args.out_type, n, 0, args.P, start, count, second);
      for (int64_t i = 0; i < count; ++i) mean[i] = mean[i] + row.mix * (mean[i] - second[i]);
    }
    if (args.grad.data) load(args.grad, OutType::kFloat32, n, 0, args.P, start, count, g);

    for (int64_t i = 0; i < count; ++i) used[i] = row.k_x * x[i] + row.k_out * mean[i];
    if (args.grad.data && row.k_pre != 0.0f)
      for (int64_t i = 0; i < count; ++i) used[i] += row.k_pre * g[i];
    for (int64_t i = 0; i < count; ++i) {
      // Written so that NaN stays NaN, as in torch.clamp.
      float limited = used[i] < -1.0f ? -1.0f : used[i];
      limited = limited > 1.0f ? 1.0f : limited;
      x0[i] = row.clip != 0.0f ? limited : used[i];
      used[i] = row.clip == 1.0f ? limited : used[i];
    }
    if (args.grad.data && row.k_post != 0.0f)
      for (int64_t i = 0; i < count; ++i) {
        used[i] += row.k_post * g[i];
        x0[i] += row.k_post * g[i];
      }
    for (int64_t i = 0; i < count; ++i) next[i] = row.a * x[i] + row.b * used[i];
    if (row.a_s != 0.0f) {
      const float* saved = args.saved + n * image + start;
      for (int64_t i = 0; i < count; ++i) next[i] += row.a_s * saved[i];
    }
    for (int slot = 0; slot < 3; ++slot) {
      if (row.d[slot] == 0.0f) continue;
      const float* h = args.history + (slot * args.N + n) * image + start;
      for (int64_t i = 0; i < count; ++i) next[i] += row.d[slot] * h[i];
    }
    if (need_sigma) {
      if (row.l1 != 0.0f) {
        load(args.out, args.out_type, n, args.C, args.P, start, count, log_var);
        if (args.out2.data) {
          load(args.out2, args.out_type, n, args.C, args.P, start, count, second);
          for (int64_t i = 0; i < count; ++i) log_var[i] = log_var[i] + row.mix * (log_var[i] - second[i]);
        }
        for (int64_t i = 0; i < count; ++i) log_var[i] = row.l0 + row.l1 * log_var[i];
      } else {
        for (int64_t i = 0; i < count; ++i) log_var[i] = row.l0;
      }
      if (row.k_mean != 0.0f && args.grad.data)
        for (int64_t i = 0; i < count; ++i) next[i] += row.k_mean * exp_poly(log_var[i]) * g[i];
      if (row.k_z != 0.0f) {
        const float* noise = z;
        if (args.noise) {
          noise = args.noise + n * image + start;
        } else {
          normal_range(args.seeds[n], args.noise_row, args.stream, start, start + count, z);
        }
        for (int64_t i = 0; i < count; ++i) next[i] += row.k_z * exp_poly(0.5f * log_var[i]) * noise[i];
      }
    }
    if (row.save != 0.0f) std::copy(x, x + count, args.saved + n * image + start);
    if (row.push_slot >= 0.0f) {
      const int64_t slot = static_cast<int64_t>(row.push_slot);
      std::copy(x0, x0 + count, args.history + (slot * args.N + n) * image + start);
    }
    std::copy(next, next + count, x);
  }
}

}  // namespace admfast
