#include "cpu_level.h"

#include <cstdlib>
#include <cstring>

namespace kd {

static CpuLevel detect() {
  CpuLevel best = baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    best = avx512;
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    best = avx2;
  }
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
