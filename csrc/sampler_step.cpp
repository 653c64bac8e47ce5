#include "sampler_step.h"

#include "cpu_isa.h"

namespace admfast {

const SamplerLoops& sampler_loops() {
#if defined(__x86_64__) && !defined(__clang__)
  if (cpu_isa() >= CpuIsa::kAvx512) return sampler_loops_avx512;
  if (cpu_isa() >= CpuIsa::kAvx2) return sampler_loops_avx2;
#endif
  return sampler_loops_generic;
}

}  // namespace admfast
