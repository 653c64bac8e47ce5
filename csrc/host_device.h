// Functions that C++ and CUDA share. They are forced inline: otherwise the linker could give a copy that was compiled
// for a wide instruction set to the other files.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADMFAST_HD static __host__ __device__ __forceinline__
#else
#define ADMFAST_HD static inline __attribute__((always_inline))
#endif

namespace admfast {

// A product, a sum and a root that are each rounded; the compiler doesn't fuse them (C++ is built with
// -ffp-contract=off).
ADMFAST_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ADMFAST_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ADMFAST_HD float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

ADMFAST_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

ADMFAST_HD uint32_t bits_of_float(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
#endif
}

}  // namespace admfast
