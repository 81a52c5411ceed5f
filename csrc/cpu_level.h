// Which instruction set the row kernels use. Each kernel is compiled once per level, in a file of its own that defines
// KD_TARGET for it (cpu_avx512.cpp, cpu_avx2.cpp, cpu_baseline.cpp); the choice is made once, at run time.
#pragma once

namespace kd {

enum CpuLevel { baseline = 0, avx2 = 3, avx512 = 4 };  // the x86-64-v numbers

// The best level of this machine, lowered by KDKERNELS_CPU_LEVEL=avx2|baseline in the environment (for tests).
CpuLevel cpu_level();

}  // namespace kd
