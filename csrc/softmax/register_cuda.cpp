// softmax and log_softmax on CUDA behind PyTorch's stable ABI: checks and the current stream.
#include "../cuda_tensors.h"
#include "cuda.h"
#include "ops.h"

namespace kd::softmax {
namespace {

Tensor forward(Tensor x, double temperature, OptionalTensor temperature_tensor, bool log) {
  check_device(x, "x", {{"temperature", temperature_tensor}});
  refuse_float64(x, "x");
  DeviceGuard device(x.get_device());
  Tensor output = fresh_like(x);
  check(cuda_forward(problem_of<float>(x, output, temperature, temperature_tensor, log), x.size(0),
                     stream_of(x)));
  return output;
}

Tensor backward(Tensor grad, Tensor output, double temperature, OptionalTensor temperature_tensor,
                bool log) {
  check_device(output, "output", {{"grad", grad}, {"temperature", temperature_tensor}});
  refuse_float64(output, "output");
  refuse_float64(grad, "grad");
  check_grad(grad, output);
  DeviceGuard device(output.get_device());
  Tensor gradient = fresh_like(output);
  auto problem = problem_of<float>(grad, output, temperature, temperature_tensor, log);
  problem.gradient = matrix_of(gradient, "gradient");
  check(cuda_backward(problem, grad.size(0), stream_of(output)));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("softmax", TORCH_BOX(&forward));
  m.impl("softmax_backward", TORCH_BOX(&backward));
}

}  // namespace kd::softmax
