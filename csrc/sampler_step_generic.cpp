// The loops of the sampler update for any machine.
#include <initializer_list>

#include "half_types.h"
#include "noise.h"
#include "sampler_update.h"

#define ADMFAST_ISA sampler_generic
#define ADMFAST_LOOPS sampler_loops_generic
#define ADMFAST_LOOPS_NAME "generic"
#define ADMFAST_BITS 0
#include "sampler_step_loops.h"
