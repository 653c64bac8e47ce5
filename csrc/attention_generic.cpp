// Loops of attention for any machine.
#include <cstdint>

#include "attention.h"
#include "factors.h"

#define ADMFAST_INLINE inline __attribute__((always_inline))
#define ADMFAST_LEVEL 0
#define ADMFAST_ISA generic_isa
#define ADMFAST_LOOPS attention_generic
#define ADMFAST_LOOPS_NAME "generic"
#include "vector.h"
#include "tiles.h"
#include "tile_layouts.h"
#include "attention_loops.h"
