// Winograd loops for any machine.
#include <cstdint>
#include <cstring>

#include "conv_winograd.h"
#include "half_types.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#define ADMFAST_LEVEL 0
#define ADMFAST_ISA generic_isa
#define ADMFAST_LOOPS winograd_generic
#define ADMFAST_LOOPS_NAME "generic"
#include "vector.h"
#include "conv_winograd_loops.h"
#include "conv_winograd_grad_loops.h"
