#if defined(__x86_64__)
#define KD_TARGET __attribute__((target("arch=x86-64-v3")))
#define KD_KERNELS kernels_avx2
#include "kernels.h"
#endif
