// Loops of the direct convolution for any machine.
#include <cstdint>

#include "conv_direct.h"
#include "factors.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#define ADMFAST_LEVEL 0
#define ADMFAST_ISA generic_isa
#define ADMFAST_LOOPS direct_generic
#define ADMFAST_LOOPS_NAME "generic"
#include "vector.h"
#include "tiles.h"
#include "conv_direct_loops.h"
