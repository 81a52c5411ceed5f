// What the registered functions of softmax and log_softmax share between devices. The schemas and
// what every argument means are in kdkernels/ops/softmax/__init__.py.
#pragma once

#include "../tensors.h"
#include "problem.h"

namespace kd::softmax {

template <class Real>
Problem<Real> problem_of(const Tensor& x, const Tensor& output, double temperature,
                         const OptionalTensor& temperature_tensor, bool log) {
  Problem<Real> problem;
  problem.x = matrix_of(x, "x");
  problem.output = matrix_of(output, "output");
  problem.temperature = parameter<Real>(temperature, temperature_tensor, "temperature", x.size(0));
  problem.log = log;
  return problem;
}

inline void check_grad(const Tensor& grad, const Tensor& output) {
  STD_TORCH_CHECK(grad.dim() == 2 && output.dim() == 2 && grad.size(0) == output.size(0) &&
                      grad.size(1) == output.size(1),
                  "kdkernels: grad and output must have the same two dimensions");
}

}  // namespace kd::softmax
