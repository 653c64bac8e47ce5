// Loops of the direct convolution for AVX-512 with products of bfloat16.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>

#include "conv_direct.h"
#include "factors.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#define ADMFAST_LEVEL 513
#define ADMFAST_ISA avx512_bf16_isa
#define ADMFAST_LOOPS direct_avx512_bf16
#define ADMFAST_LOOPS_NAME "avx512_bf16"
#include "vector.h"
#include "tiles.h"
#include "conv_direct_loops.h"
#endif
