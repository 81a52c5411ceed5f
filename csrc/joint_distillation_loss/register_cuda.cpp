// joint_distillation_loss on CUDA behind PyTorch's stable ABI, from what its parts have there.
#include "../distillation_loss/cuda_ops.h"
#include "../feature_loss/cuda_ops.h"
#include "cuda.h"

namespace kd::joint {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Result joint_distillation_loss(Tensor student, Tensor teacher, KD_OPTIONS, KD_FEATURES,
                               bool student_grad, std::vector<bool> wanted) {
  Options options = KD_TAKE_OPTIONS;
  features::Arguments arguments = KD_TAKE_FEATURES;
  check_forward(student, teacher, options);
  STD_TORCH_CHECK(!arguments.students.empty(), "kdkernels: features must have one layer or more");
  check_device(student, "student", {{"features", arguments.students[0]}});
  DeviceGuard device(student.get_device());
  Tensor gradient = student_grad ? fresh_like(student) : empty_gradient(student);
  auto [logits, loss, rows] =
      forward_of<float>(student, teacher, options, student_grad ? &gradient : nullptr, nullptr);
  STD_TORCH_CHECK(logits.reduction != Reduction::none,
                  "kdkernels: reduction 'none' is not joint_distillation_loss's");
  features::DeviceWork work = features::device_work(arguments, std::nullopt, wanted, 1);
  STD_TORCH_CHECK(work.problem.reduction != Reduction::none,
                  "kdkernels: reduction 'none' is not joint_distillation_loss's");
  // All of it returns to the allocator at the end of this function, which hands it out again in the
  // order of this stream: after the kernels.
  Tensor totals = torch::stable::new_empty(student, {logits.n}, ScalarType::Float);
  logits.totals = static_cast<float*>(totals.data_ptr());
  work.problem.loss = static_cast<float*>(loss.data_ptr());
  DeviceProblem problem{logits, work.problem, static_cast<float*>(work.parts.data_ptr())};
  int64_t bytes = 0;
  check(cuda_prepare(problem, &bytes));
  Tensor workspace = torch::stable::new_empty(student, {bytes}, ScalarType::Byte);
  check(cuda_joint(problem, workspace.data_ptr(), stream_of(student)));
  return {loss, rows, work.parts, gradient, work.gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("joint_distillation_loss", TORCH_BOX(&joint_distillation_loss));
}

}  // namespace kd::joint
