#include "conv_direct.h"

#include "cpu_isa.h"

namespace admfast {

const DirectLoops& direct_loops() {
#if defined(ADMFAST_AMX)
  if (cpu_isa() >= CpuIsa::kAmx) return direct_amx;
#endif
#if defined(__x86_64__) && !defined(__clang__)
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) return direct_avx512_bf16;
#endif
  return direct_generic;
}

}  // namespace admfast
