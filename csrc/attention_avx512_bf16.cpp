// Loops of attention for AVX-512 with products of bfloat16.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "factors.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#define ADMFAST_LEVEL 513
#define ADMFAST_ISA avx512_bf16_isa
#define ADMFAST_LOOPS attention_avx512_bf16
#define ADMFAST_LOOPS_NAME "avx512_bf16"
#include "vector.h"
#include "tiles.h"
#include "tile_layouts.h"
#include "attention_loops.h"
#endif
