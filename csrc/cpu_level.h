// Which instruction set the row kernels use. Each kernel is compiled once per level, in a file of
// its own that defines KD_TARGET for it (cpu_avx512.cpp, cpu_avx2.cpp, cpu_baseline.cpp); the
// choice is made once, at run time.
#pragma once

namespace kd {

enum CpuLevel { baseline = 0, avx2 = 3, avx512 = 4 };  // the x86-64-v numbers

// The best level of this machine, lowered by KDKERNELS_CPU_LEVEL=avx2|baseline in the environment
// (for tests).
CpuLevel cpu_level();

// This machine's table of kernels: name_baseline, name_avx2 or name_avx512.
#if defined(__x86_64__)
#define KD_AT_CPU_LEVEL(name) \
  (cpu_level() == avx512 ? name##_avx512 : cpu_level() == avx2 ? name##_avx2 : name##_baseline)
#else
#define KD_AT_CPU_LEVEL(name) (name##_baseline)
#endif

}  // namespace kd
