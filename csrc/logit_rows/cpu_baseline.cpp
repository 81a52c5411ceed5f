#define KD_TARGET
#define KD_KERNELS kernels_baseline
#include "kernels.h"
