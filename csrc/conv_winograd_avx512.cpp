// Winograd loops for AVX-512.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "conv_winograd.h"
#include "half_types.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define ADMFAST_LEVEL 512
#define ADMFAST_ISA avx512_isa
#define ADMFAST_LOOPS winograd_avx512
#define ADMFAST_LOOPS_NAME "avx512"
#include "vector.h"
#include "conv_winograd_loops.h"
#include "conv_winograd_grad_loops.h"
#endif
