// softmax and log_softmax on the CPU behind PyTorch's stable ABI: checks, allocation, threads. The
// schemas and what every argument means are in kdkernels/ops/softmax/__init__.py.
#include "../cpu_level.h"
#include "../tensors.h"
#include "problem.h"

namespace kd::softmax {
namespace {

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

Tensor forward(Tensor x, double temperature, OptionalTensor temperature_tensor, bool log) {
  Tensor output = fresh_like(x);
  const Kernels& table = KD_AT_CPU_LEVEL(kernels);
  auto run = [&](auto problem, auto rows) { over_rows(x.size(0), x.size(1), problem, rows); };
  if (dtype_of(x) == Dtype::float64) {
    run(problem_of<double>(x, output, temperature, temperature_tensor, log), table.forward_double);
  } else {
    run(problem_of<float>(x, output, temperature, temperature_tensor, log), table.forward_float);
  }
  return output;
}

Tensor backward(Tensor grad, Tensor output, double temperature, OptionalTensor temperature_tensor,
                bool log) {
  STD_TORCH_CHECK(grad.dim() == 2 && output.dim() == 2 && grad.size(0) == output.size(0) &&
                      grad.size(1) == output.size(1),
                  "kdkernels: grad and output must have the same two dimensions");
  Tensor gradient = fresh_like(output);
  const Kernels& table = KD_AT_CPU_LEVEL(kernels);
  auto run = [&](auto problem, auto rows) {
    problem.gradient = matrix_of(gradient, "gradient");
    over_rows(grad.size(0), grad.size(1), problem, rows);
  };
  if (dtype_of(output) == Dtype::float64) {
    run(problem_of<double>(grad, output, temperature, temperature_tensor, log),
        table.backward_double);
  } else {
    run(problem_of<float>(grad, output, temperature, temperature_tensor, log),
        table.backward_float);
  }
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("softmax", TORCH_BOX(&forward));
  m.impl("softmax_backward", TORCH_BOX(&backward));
}

}  // namespace kd::softmax
