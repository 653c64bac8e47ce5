// The update of one element, for C++ and CUDA; the formula is in admfast/ops/update/step.py.
#pragma once

#include "host_device.h"
#include "sampler_step.h"

namespace admfast {

// A row, and which of its terms are computed. Terms whose coefficient is 0 are not, so that NaN or infinity in their
// inputs doesn't reach x.
struct Update {
  SamplerRow k;
  float limit_used, limit_reported;  // 1 with clipping, infinity without
  bool mixes, pre, post, mean, noise, learned;
};

ADMFAST_HD Update update_of(const SamplerRow& row, bool has_out2, bool has_grad) {
  const float infinity = float_of_bits(0x7F800000u);
  Update u;
  u.k = row;
  u.limit_used = row.clip == 1.0f ? 1.0f : infinity;
  u.limit_reported = row.clip != 0.0f ? 1.0f : infinity;
  u.mixes = has_out2 && row.mix != 0.0f;
  u.pre = has_grad && row.k_pre != 0.0f;
  u.post = has_grad && row.k_post != 0.0f;
  u.mean = has_grad && row.k_mean != 0.0f;
  u.noise = row.k_z != 0.0f;
  u.learned = row.l1 != 0.0f && (u.mean || u.noise);
  return u;
}

ADMFAST_HD bool uses_saved(const SamplerRow& row) { return row.a_s != 0.0f || row.save != 0.0f; }

ADMFAST_HD bool uses_history(const SamplerRow& row) {
  return row.push_slot >= 0.0f || row.d[0] != 0.0f || row.d[1] != 0.0f || row.d[2] != 0.0f;
}

// e^v. On the host 2^n * P(r) with P of degree 6 (relative error 2e-9 before rounding); 0 below -87, infinity above 88.
ADMFAST_HD float exp_of(float v) {
#if defined(__CUDA_ARCH__)
  return expf(v);
#else
  float clamped = v < -87.0f ? -87.0f : v;
  clamped = clamped > 88.0f ? 88.0f : clamped;
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits. Every vector unit can do this.
  const float shifted = clamped * 0x1.715476p+0f + 0x1.8p+23f;
  const float n = shifted - 0x1.8p+23f;
  const float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6dd98cp-10f;
  p = p * r + 0x1.126fbap-7f;
  p = p * r + 0x1.55541cp-5f;
  p = p * r + 0x1.555404p-3f;
  p = p * r + 0x1.0p-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  float result = p * float_of_bits((bits_of_float(shifted) + 127u) << 23);
  result = v < -87.0f ? 0.0f : result;
  result = v > 88.0f ? float_of_bits(0x7F800000u) : result;
  return v == v ? result : v;
#endif
}

// NaN stays NaN, as in torch.clamp.
ADMFAST_HD float limited(float v, float limit) {
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

ADMFAST_HD float mixed(float out, float out2, float mix) { return out + mix * (out - out2); }

// Returns a x + b x0, with x0 as the update uses it; `reported` becomes x0 as it is reported.
ADMFAST_HD float predict(const Update& u, float x, float o, float g, float& reported) {
  float used = u.k.k_x * x + u.k.k_out * o;
  if (u.pre) used += u.k.k_pre * g;
  reported = limited(used, u.limit_reported);
  used = limited(used, u.limit_used);
  if (u.post) {
    used += u.k.k_post * g;
    reported += u.k.k_post * g;
  }
  return u.k.a * x + u.k.b * used;
}

// The value that a row pushes: x0, or the noise, as p_x and p_0 say.
ADMFAST_HD float pushed(const Update& u, float x, float x0) {
  const float value = u.k.p_0 != 0.0f ? u.k.p_0 * x0 : 0.0f;
  return u.k.p_x != 0.0f ? value + u.k.p_x * x : value;
}

ADMFAST_HD float log_variance(const Update& u, float v) { return u.k.l0 + u.k.l1 * v; }

ADMFAST_HD float sigma_of(float log_variance) { return exp_of(0.5f * log_variance); }

}  // namespace admfast
