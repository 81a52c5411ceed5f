// The CUDA launchers of logit_rows; as distillation_loss/cuda.h.
#pragma once

#include "../cuda_status.h"
#include "problem.h"

namespace kd::logit_rows {

CudaStatus cuda_moments(const Matrix& x, int64_t n, int64_t vocab, float* out, CudaStream stream);
CudaStatus cuda_add_centered(const Centered<float>& problem, int64_t n, CudaStream stream);
CudaStatus cuda_temperature_sums(const Problem<float>& problem, float* out, CudaStream stream);
CudaStatus cuda_adaptive_weights(const Adaptive<float>& problem, int64_t n, CudaStream stream);

}  // namespace kd::logit_rows
