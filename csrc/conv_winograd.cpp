#include "conv_winograd.h"

#include "cpu_isa.h"

namespace admfast {

const WinogradLoops& winograd_loops() {
#if defined(__x86_64__) && !defined(__clang__)
  if (cpu_isa() >= CpuIsa::kAvx512) return winograd_avx512;
  if (cpu_isa() >= CpuIsa::kAvx2) return winograd_avx2;
#endif
  return winograd_generic;
}

}  // namespace admfast
