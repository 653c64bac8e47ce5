// Loops of attention for AMX.
#include "cpu_isa.h"
#if defined(ADMFAST_AMX)
#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "factors.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,amx-tile,amx-bf16,amx-int8")
#define ADMFAST_LEVEL 514
#define ADMFAST_ISA amx_isa
#define ADMFAST_LOOPS attention_amx
#define ADMFAST_LOOPS_NAME "amx"
#include "vector.h"
#include "tiles.h"
#include "tile_layouts.h"
#include "attention_loops.h"
#endif
