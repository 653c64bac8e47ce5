#include "group_norm.h"

#include <cstdlib>
#include <cstring>

namespace admfast {
namespace {

const GroupNormLoops& choose() {
#if defined(__x86_64__) && !defined(__clang__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const struct {
    const GroupNormLoops& loops;
    bool runs;
  } known[] = {{group_norm_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
               {group_norm_avx512, avx512},
               {group_norm_avx2, avx2}};
  const char* asked = std::getenv("ADMFAST_CPU_ISA");
  if (asked && !*asked) asked = nullptr;
  for (const auto& one : known)
    if (one.runs && (!asked || std::strcmp(asked, one.loops.name) == 0)) return one.loops;
#endif
  return group_norm_generic;
}

}  // namespace

const GroupNormLoops& group_norm_loops() {
  static const GroupNormLoops& loops = choose();
  return loops;
}

}  // namespace admfast
