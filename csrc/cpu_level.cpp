#include "cpu_level.h"

#include <cstdlib>
#include <cstring>

namespace kd {

static CpuLevel detect() {
  CpuLevel best = baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The features of x86-64-v3 and v4 one by one: g++ 11 knows the levels as targets but not here.
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  if (v3) best = v4 ? avx512 : avx2;
#endif
  const char* wanted = std::getenv("KDKERNELS_CPU_LEVEL");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "baseline") == 0) return baseline;
  if (std::strcmp(wanted, "avx2") == 0 && best > avx2) return avx2;
  return best;
}

CpuLevel cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

}  // namespace kd
