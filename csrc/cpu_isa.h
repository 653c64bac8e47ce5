// The instruction set that all CPU loops of this process use. Nothing here depends on torch.
#pragma once

#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Compilers that know AMX: GCC from version 11.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define ADMFAST_AMX
#endif

namespace admfast {

// In order: each one includes those before it.
enum class CpuIsa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kCpuIsaNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

// Ask Linux for the registers of AMX, which a process may use only after that.
inline bool amx_allowed() {
#if defined(__linux__) && defined(ADMFAST_AMX)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuIsa widest_cpu_isa() {
#if defined(__x86_64__) && !defined(__clang__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return CpuIsa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return CpuIsa::kAvx512;
#if defined(ADMFAST_AMX)
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
      amx_allowed())
    return CpuIsa::kAmx;
#endif
  return CpuIsa::kAvx512Bf16;
#else
  return CpuIsa::kGeneric;
#endif
}

// The widest instruction set that this machine runs, or the one that the environment variable ADMFAST_CPU_ISA names;
// generic if that one is unknown or can't run here.
inline CpuIsa cpu_isa() {
  static const CpuIsa found = [] {
    const CpuIsa widest = widest_cpu_isa();
    const char* asked = std::getenv("ADMFAST_CPU_ISA");
    if (!asked || !*asked) return widest;
    for (int i = 0; i <= static_cast<int>(widest); ++i)
      if (std::strcmp(asked, kCpuIsaNames[i]) == 0) return static_cast<CpuIsa>(i);
    return CpuIsa::kGeneric;
  }();
  return found;
}

}  // namespace admfast
