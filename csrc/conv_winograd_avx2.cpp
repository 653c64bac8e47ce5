// Winograd loops for AVX2.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "conv_winograd.h"
#include "half_types.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#pragma GCC target("avx2,fma")
#define ADMFAST_LEVEL 256
#define ADMFAST_ISA avx2_isa
#define ADMFAST_LOOPS winograd_avx2
#define ADMFAST_LOOPS_NAME "avx2"
#include "vector.h"
#include "conv_winograd_loops.h"
#include "conv_winograd_grad_loops.h"
#endif
