#include "sampler_step.h"

#include <cstdlib>
#include <cstring>

namespace admfast {
namespace {

const SamplerLoops& choose() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("ADMFAST_CPU_ISA");
  if (asked && !*asked) asked = nullptr;
  const auto wanted = [asked](const SamplerLoops& loops) {
    // Only the beginning must match: avx512_bf16 names more than these loops have a variant for.
    return !asked || std::strncmp(asked, loops.name, std::strlen(loops.name)) == 0;
  };
  if (avx512 && wanted(sampler_loops_avx512)) return sampler_loops_avx512;
  if (avx2 && wanted(sampler_loops_avx2)) return sampler_loops_avx2;
#endif
  return sampler_loops_generic;
}

}  // namespace

const SamplerLoops& sampler_loops() {
  static const SamplerLoops& loops = choose();
  return loops;
}

}  // namespace admfast
