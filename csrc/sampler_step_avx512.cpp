// The loops of the sampler update for AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the vectors that immintrin.h leaves uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <initializer_list>

#include "half_types.h"
#include "noise.h"
#include "sampler_update.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512")
#define ADMFAST_ISA sampler_avx512
#define ADMFAST_LOOPS sampler_loops_avx512
#define ADMFAST_LOOPS_NAME "avx512"
#define ADMFAST_BITS 512  // GCC before 13 does not set __AVX512F__ for the pragma
#include "sampler_step_loops.h"
#endif
