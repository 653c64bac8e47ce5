// Philox4x32-10 and Box-Muller, with the same operations, and so the same bits, as admfast/ops/update/noise.py.
#pragma once

#include "host_device.h"

namespace admfast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

ADMFAST_HD void philox4x32_10(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// p * x + c, rounded twice.
ADMFAST_HD float horner(float p, float x, float c) { return add_rn(mul_rn(p, x), c); }

// ln u for u in (0, 1].
ADMFAST_HD float log_unit(float u) {
  const int32_t bits = static_cast<int32_t>(bits_of_float(u));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = add_rn(float_of_bits(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23)), -1.0f);
  float p = 0x1.6efe58p-4f;
  p = horner(p, f, -0x1.28981ap-3f);
  p = horner(p, f, 0x1.31821cp-3f);
  p = horner(p, f, -0x1.52d0e0p-3f);
  p = horner(p, f, 0x1.98bf94p-3f);
  p = horner(p, f, -0x1.0007b8p-2f);
  p = horner(p, f, 0x1.555780p-2f);
  p = horner(p, f, -0x1.fffff2p-2f);
  p = horner(p, f, 0x1.000000p+0f);
  const float e = static_cast<float>(exponent);
  return add_rn(mul_rn(e, 0x1.62e4p-1f), add_rn(mul_rn(f, p), mul_rn(e, 0x1.7f7d1cp-20f)));
}

// Two standard normals from two words.
ADMFAST_HD void box_muller(uint32_t a, uint32_t b, float& even, float& odd) {
  const float u = add_rn(mul_rn(static_cast<float>(a), 0x1p-32f), 0x1p-33f);
  const float radius = sqrt_rn(mul_rn(log_unit(u), -2.0f));
  const uint32_t shifted = b + 0x20000000u;
  const uint32_t quarter = shifted >> 30;
  const int32_t remainder = static_cast<int32_t>(shifted & 0x3FFFFFFFu) - 0x20000000;
  const float f = mul_rn(static_cast<float>(remainder), 0x1p-30f);
  const float square = mul_rn(f, f);
  float s = -0x1.2d9bb8p-8f;
  s = horner(s, square, 0x1.465ec6p-4f);
  s = horner(s, square, -0x1.4abbbap-1f);
  s = horner(s, square, 0x1.921fb6p+0f);
  s = mul_rn(f, s);
  float c = -0x1.4e5ed6p-6f;
  c = horner(c, square, 0x1.03af5cp-2f);
  c = horner(c, square, -0x1.3bd392p+0f);
  c = horner(c, square, 0x1.000000p+0f);
  const bool swap = quarter & 1u;
  const float cos_angle = swap ? -s : c;
  const float sin_angle = swap ? c : s;
  const bool upper = quarter >= 2u;
  even = mul_rn(radius, upper ? -cos_angle : cos_angle);
  odd = mul_rn(radius, upper ? -sin_angle : sin_angle);
}

// The four normals of one block of an image; the image's seed is the key.
ADMFAST_HD void normal_block(uint64_t seed, uint64_t block, uint32_t row, uint32_t stream, float z[4]) {
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), row, stream};
  philox4x32_10(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  box_muller(c[0], c[1], z[0], z[1]);
  box_muller(c[2], c[3], z[2], z[3]);
}

}  // namespace admfast
