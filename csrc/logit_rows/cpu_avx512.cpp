#if defined(__x86_64__)
#define KD_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define KD_KERNELS kernels_avx512
#include "kernels.h"
#endif
