// The loops of the sampler update for AVX2.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <initializer_list>

#include "half_types.h"
#include "noise.h"
#include "sampler_update.h"

#pragma GCC target("avx2")
#define ADMFAST_ISA sampler_avx2
#define ADMFAST_LOOPS sampler_loops_avx2
#define ADMFAST_LOOPS_NAME "avx2"
#define ADMFAST_BITS 256
#include "sampler_step_loops.h"
#endif
