// The two half-precision types as bits, and their conversion to float. They are no library's types, so that C++, CUDA
// and every instruction set read them in the same way.
#pragma once

#include "host_device.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace admfast {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

ADMFAST_HD float to_float(float v) { return v; }

ADMFAST_HD float to_float(bfloat16 v) { return float_of_bits(static_cast<uint32_t>(v.bits) << 16); }

ADMFAST_HD float to_float(float16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  // A product with 2^112 adjusts the exponent, and turns subnormals into normals without a branch.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t bits = bits_of_float(float_of_bits(static_cast<uint32_t>(v.bits & 0x7FFFu) << 13) * 0x1p112f);
  return float_of_bits(bits | ((v.bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u) | sign);
#endif
}

}  // namespace admfast
