#define KD_TARGET
#define KD_VECTOR 16
#define KD_ROWS 4
#define KD_FLOAT float_baseline
#define KD_DOUBLE double_baseline
#include "kernels.h"
