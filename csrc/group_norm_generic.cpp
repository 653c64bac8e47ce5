// GroupNorm loops for any machine.
#include <cstdint>
#include <cstring>

#include "group_norm.h"
#include "half_types.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#define ADMFAST_LEVEL 0
#define ADMFAST_ISA generic_isa
#define ADMFAST_LOOPS group_norm_generic
#define ADMFAST_LOOPS_NAME "generic"
#include "vector.h"
#include "group_norm_loops.h"
