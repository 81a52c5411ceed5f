// The CUDA launchers of softmax and log_softmax; as distillation_loss/cuda.h.
#pragma once

#include "../cuda_status.h"
#include "problem.h"

namespace kd::softmax {

CudaStatus cuda_forward(const Problem<float>& problem, int64_t n, CudaStream stream);
CudaStatus cuda_backward(const Problem<float>& problem, int64_t n, CudaStream stream);

}  // namespace kd::softmax
