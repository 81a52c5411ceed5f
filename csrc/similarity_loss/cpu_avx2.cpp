#if defined(__x86_64__)
#define KD_TARGET __attribute__((target("arch=x86-64-v3")))
#define KD_VECTOR 32
#define KD_ROWS 4
#define KD_FLOAT float_avx2
#define KD_DOUBLE double_avx2
#include "kernels.h"
#endif
