// The functions of logit_rows on CUDA behind PyTorch's stable ABI: checks and the current stream.
#include "../cuda_tensors.h"
#include "cuda.h"
#include "ops.h"

namespace kd::logit_rows {
namespace {

Tensor row_moments(Tensor x, int64_t vocab_size) {
  refuse_float64(x, "x");
  DeviceGuard device(x.get_device());
  int64_t n = x.size(0);
  Tensor out = torch::stable::new_empty(x, {2, n}, ScalarType::Float);
  check(cuda_moments(checked(x, "x", vocab_size), n, vocab_size,
                     static_cast<float*>(out.data_ptr()), stream_of(x)));
  return out;
}

void add_centered_(Tensor grad, Tensor x, Tensor mean, Tensor factor, int64_t vocab_size) {
  check_device(grad, "grad", {{"x", x}, {"mean", mean}, {"factor", factor}});
  refuse_float64(grad, "grad");
  refuse_float64(x, "x");
  DeviceGuard device(grad.get_device());
  check(cuda_add_centered(centered_of<float>(grad, x, mean, factor, vocab_size), x.size(0),
                          stream_of(grad)));
}

Tensor temperature_sums(Tensor student, Tensor teacher, Tensor rows, OptionalTensor labels,
                        std::string divergence, int64_t vocab_size) {
  check_device(student, "student", {{"teacher", teacher}, {"rows", rows}, {"labels", labels}});
  refuse_float64(student, "student");
  refuse_float64(teacher, "teacher");
  DeviceGuard device(student.get_device());
  auto problem = sums_of<float>(student, teacher, rows, labels, divergence, vocab_size);
  Tensor out = torch::stable::new_empty(student, {3, problem.n}, ScalarType::Float);
  check(cuda_temperature_sums(problem, static_cast<float*>(out.data_ptr()), stream_of(student)));
  return out;
}

Tensor adaptive_weights(Tensor student, Tensor teacher, Tensor temperature,
                        Tensor teacher_temperature, int64_t vocab_size) {
  check_device(student, "student",
               {{"teacher", teacher},
                {"temperature", temperature},
                {"teacher_temperature", teacher_temperature}});
  refuse_float64(student, "student");
  refuse_float64(teacher, "teacher");
  DeviceGuard device(student.get_device());
  auto [problem, out] =
      adaptive_of<float>(student, teacher, temperature, teacher_temperature, vocab_size);
  check(cuda_adaptive_weights(problem, student.size(0), stream_of(student)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("row_moments", TORCH_BOX(&row_moments));
  m.impl("add_centered_", TORCH_BOX(&add_centered_));
  m.impl("temperature_sums", TORCH_BOX(&temperature_sums));
  m.impl("adaptive_weights", TORCH_BOX(&adaptive_weights));
}

}  // namespace kd::logit_rows
