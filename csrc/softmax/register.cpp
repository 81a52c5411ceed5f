// softmax and log_softmax on the CPU behind PyTorch's stable ABI: threads.
#include "../cpu_level.h"
#include "ops.h"

namespace kd::softmax {
namespace {

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
  check_grad(grad, output);
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
