// The CUDA launcher of joint_distillation_loss; as those of its parts.
#pragma once

#include "../distillation_loss/cuda.h"
#include "../feature_loss/cuda.h"

namespace kd::joint {

struct DeviceProblem {
  kd::Problem<float> logits;
  features::DeviceProblem features;  // whose loss is that of both, whose parts are its own
  float* part = nullptr;             // the logits'
  int64_t features_bytes = 0;        // of the workspace: cuda_prepare
};

// As features::cuda_prepare.
CudaStatus cuda_prepare(DeviceProblem& problem, int64_t* bytes);
// One launch for forward KL and DKD, one of each part for other divergences; one more for every
// kLayersALaunch layers beyond the first.
CudaStatus cuda_joint(const DeviceProblem& problem, void* workspace, CudaStream stream);

}  // namespace kd::joint
