// distillation_loss on CUDA behind PyTorch's stable ABI: checks, device memory, the current stream.
// Nothing waits for the device.
#include "cuda.h"
#include "cuda_ops.h"

namespace kd {
namespace {

void refuse_center(const OptionalTensor& center) {
  STD_TORCH_CHECK(!center,
                  "kdkernels: the CUDA library takes no teacher_center; accepted: the "
                  "teacher's logits less the center");
}

std::tuple<Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, const Options& o,
                                   const Tensor* student_grad, const Tensor* teacher_grad) {
  refuse_center(o.teacher_center);
  check_forward(student, teacher, o);
  DeviceGuard device(student.get_device());
  auto [problem, loss, rows] = forward_of<float>(student, teacher, o, student_grad, teacher_grad);
  // Both return to the allocator at the end of this function, which hands them out again in the
  // order of this stream: after the kernels.
  OptionalTensor totals;
  float* loss_data = nullptr;
  if (problem.reduction != Reduction::none) {
    totals = torch::stable::new_empty(student, {problem.n}, ScalarType::Float);
    problem.totals = static_cast<float*>(totals->data_ptr());
    loss_data = static_cast<float*>(loss.data_ptr());
  }
  Tensor workspace = torch::stable::new_empty(student, {cuda_workspace_bytes()}, ScalarType::Byte);
  check(cuda_forward(problem, loss_data, workspace.data_ptr(), stream_of(student)));
  return {loss, rows};
}

void backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
              const Tensor& rows, const OptionalTensor& labels, const std::string& divergence,
              double label_smoothing, int64_t vocab_size, const OptionalTensor& center,
              const Tensor* student_grad, const Tensor* teacher_grad) {
  refuse_center(center);
  check_device(
      student, "student",
      {{"grad_loss", grad_loss}, {"teacher", teacher}, {"rows", rows}, {"labels", labels}});
  refuse_float64(student, "student");
  refuse_float64(teacher, "teacher");
  DeviceGuard device(student.get_device());
  check(cuda_backward(backward_of<float>(grad_loss, student, teacher, rows, labels, divergence,
                                         label_smoothing, vocab_size, student_grad, teacher_grad),
                      stream_of(student)));
}

void scale_rows_(Tensor grad, Tensor factor) {
  check_device(grad, "grad", {{"factor", factor}});
  refuse_float64(grad, "grad");
  DeviceGuard device(grad.get_device());
  Tensor by = factor.is_contiguous() ? factor : torch::stable::contiguous(factor);
  int64_t n = grad.size(0), stride = factor.numel() == 1 ? 0 : 1;
  check(cuda_scale_rows(matrix_of(grad, "grad"), n, reals<float>(by, "factor", n), stride,
                        stream_of(grad)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss<forward>));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward<backward>));
  m.impl("distillation_loss_and_grad", TORCH_BOX(&distillation_loss_and_grad<forward>));
  m.impl("distillation_loss_and_grad_", TORCH_BOX(&distillation_loss_and_grad_<forward>));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}

}  // namespace kd
