// feature_loss on CUDA behind PyTorch's stable ABI: checks, device memory, the current stream.
// Nothing waits for the device.
#include "cuda_ops.h"

namespace kd::features {
namespace {

std::tuple<Tensor, Tensor, std::vector<Tensor>> feature_loss(KD_FEATURES, OptionalTensor upstream,
                                                             std::vector<bool> wanted) {
  Arguments arguments = KD_TAKE_FEATURES;
  if (upstream && !upstream->is_contiguous()) upstream = torch::stable::contiguous(*upstream);
  STD_TORCH_CHECK(!arguments.students.empty(), "kdkernels: features must have one layer or more");
  const Tensor& like = arguments.students[0];
  STD_TORCH_CHECK(like.is_cuda(), "kdkernels: student is not on a CUDA device");
  DeviceGuard device(like.get_device());
  DeviceWork work = device_work(arguments, upstream, wanted, 0);
  DeviceProblem& problem = work.problem;
  bool none = problem.reduction == Reduction::none;
  int64_t layers = static_cast<int64_t>(problem.layers.size());
  Tensor loss = torch::stable::new_empty(
      like, none ? std::vector<int64_t>{layers, like.size(0)} : std::vector<int64_t>{},
      std::make_optional(ScalarType::Float));
  STD_TORCH_CHECK(!none || work.units == loss.numel(),
                  "kdkernels: reduction 'none' needs the same samples in every layer");
  problem.loss = static_cast<float*>(loss.data_ptr());
  int64_t bytes = 0;
  check(cuda_prepare(problem, &bytes));
  // It returns to the allocator at the end of this function, which hands it out again in the order
  // of this stream: after the kernels.
  Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  check(cuda_feature_loss(problem, 0, nullptr, workspace.data_ptr(), stream_of(like)));
  return {loss, work.parts, work.gradients};
}

// Gradients are dense: whatever their strides, their memory is one block.
void scale_features_(std::vector<Tensor> grads, Tensor factor) {
  std::vector<Flat> flat;
  for (const Tensor& grad : grads) {
    check_device(factor, "factor", {{"a gradient", grad}});
    refuse_float64(grad, "a gradient");
    if (grad.numel() > 0) {
      flat.push_back({static_cast<char*>(grad.data_ptr()), dtype_of(grad), grad.numel()});
    }
  }
  if (flat.empty()) return;
  DeviceGuard device(factor.get_device());
  check(cuda_scale_features(flat, reals<float>(factor, "factor", 1), stream_of(factor)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("feature_loss", TORCH_BOX(&feature_loss));
  m.impl("scale_features_", TORCH_BOX(&scale_features_));
}

}  // namespace kd::features
