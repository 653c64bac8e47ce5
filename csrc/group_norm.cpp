#include "group_norm.h"

#include "cpu_isa.h"

namespace admfast {

const GroupNormLoops& group_norm_loops() {
#if defined(__x86_64__) && !defined(__clang__)
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) return group_norm_avx512_bf16;
  if (cpu_isa() >= CpuIsa::kAvx512) return group_norm_avx512;
  if (cpu_isa() >= CpuIsa::kAvx2) return group_norm_avx2;
#endif
  return group_norm_generic;
}

}  // namespace admfast
