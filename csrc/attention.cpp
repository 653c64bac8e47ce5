#include "attention.h"

#include "cpu_isa.h"

namespace admfast {

const AttentionLoops& attention_loops() {
#if defined(ADMFAST_AMX)
  if (cpu_isa() >= CpuIsa::kAmx) return attention_amx;
#endif
#if defined(__x86_64__) && !defined(__clang__)
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) return attention_avx512_bf16;
#endif
  return attention_generic;
}

}  // namespace admfast
