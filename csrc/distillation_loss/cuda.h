// The CUDA launchers of distillation_loss: device pointers in the Problem, work queued on the
// stream of the current device, nothing allocated, no wait. `masks` of the Problem is not used.
#pragma once

#include "../cuda_status.h"
#include "problem.h"

namespace kd {

// Bytes of device memory that a call needs beside its results. It need not be cleared.
int64_t cuda_workspace_bytes();

// Fills rows and totals, the gradients that have data, and where it is not null the 0-d loss (Σ
// totals).
CudaStatus cuda_forward(const Problem<float>& problem, float* loss, void* workspace,
                        CudaStream stream);
CudaStatus cuda_backward(const Problem<float>& problem, CudaStream stream);
// Rows times a factor each, in place, left alone where it is 1.
CudaStatus cuda_scale_rows(const Matrix& matrix, int64_t n, const float* factor, int64_t stride,
                           CudaStream stream);

}  // namespace kd
