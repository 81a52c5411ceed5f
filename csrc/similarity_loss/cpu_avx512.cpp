#if defined(__x86_64__)
#define KD_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define KD_VECTOR 64
#define KD_ROWS 8
#define KD_FLOAT float_avx512
#define KD_DOUBLE double_avx512
#include "kernels.h"
#endif
