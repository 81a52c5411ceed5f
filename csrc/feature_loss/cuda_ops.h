// What the registered CUDA functions of feature_loss and joint_distillation_loss share: a call's
// tensors as a DeviceProblem.
#pragma once

#include "../cuda_tensors.h"
#include "cuda.h"
#include "ops.h"

namespace kd::features {

struct DeviceWork {
  DeviceProblem problem;
  Tensor parts;
  std::vector<Tensor> gradients;
  int64_t units = 0;
};

// Everything but where the loss goes. first_part: of the layers in `parts`, behind what another
// loss has there.
inline DeviceWork device_work(const Arguments& a, const OptionalTensor& upstream,
                              const std::vector<bool>& wanted, int64_t first_part) {
  size_t n = a.students.size();
  STD_TORCH_CHECK(n >= 1 && a.teachers.size() == n && a.masks.size() == n &&
                      a.log_variances.size() == n && a.dims.size() == n && a.weights.size() == n &&
                      wanted.size() == 2 * n,
                  "kdkernels: lists of features must have one entry a layer");
  const Tensor& like = a.students[0];
  check_device(like, "student", {{"weights", a.weights_tensor}, {"upstream", upstream}});
  DeviceWork work;
  DeviceProblem& p = work.problem;
  p.metric = metric_named(a.metric);
  p.normalize = a.normalize;
  p.beta = static_cast<float>(a.beta);
  p.reduction = reduction_named(a.reduction);
  int64_t count = static_cast<int64_t>(n);
  if (a.weights_tensor) {
    STD_TORCH_CHECK(a.weights_tensor->numel() == count,
                    "kdkernels: weights must have one value a layer");
    p.weights = reals<float>(*a.weights_tensor, "weights", count);
  }
  for (size_t i = 0; i < n; ++i) {
    work.gradients.push_back(wanted[i] ? torch::stable::empty_like(a.students[i])
                                       : torch::stable::new_empty(a.students[i], {0}));
  }
  bool gaussian = p.metric == Metric::gaussian_nll;
  for (size_t i = 0; i < n; ++i) {
    const OptionalTensor& variance = a.log_variances[i];
    check_device(like, "student",
                 {{"a student", a.students[i]},
                  {"a teacher", a.teachers[i]},
                  {"a mask", a.masks[i]},
                  {"a log_variance", variance}});
    refuse_float64(a.students[i], "a student");
    refuse_float64(a.teachers[i], "a teacher");
    STD_TORCH_CHECK(gaussian == variance.has_value(),
                    "kdkernels: log_variance is of gaussian_nll, for every layer");
    DeviceLayer layer;
    static_cast<Layer<float>&>(layer) =
        layer_of<float>(a.students[i], a.teachers[i], wanted[i] ? &work.gradients[i] : nullptr,
                        a.masks[i], a.dims[i], p.metric, a.normalize);
    layer.weight = a.weights[i];
    layer.first_unit = work.units;
    work.units += layer.samples;
    set_divisor(layer, p.metric, p.reduction, a.students[i].size(a.dims[i]));
    Tensor variance_gradient = torch::stable::new_empty(a.students[i], {0});
    if (gaussian) {
      STD_TORCH_CHECK(variance->dim() == 1 && variance->size(0) == layer.channels,
                      "kdkernels: log_variance must have one value a channel");
      layer.variance = feature_of(*variance);
      layer.variance.strides.channel = variance->stride(0);
      if (wanted[n + i]) {
        variance_gradient = torch::stable::new_empty(*variance, {layer.channels});
        layer.variance_gradient = feature_of(variance_gradient);
      }
    }
    work.gradients.push_back(variance_gradient);
    p.layers.push_back(layer);
  }
  if (upstream) {
    STD_TORCH_CHECK(upstream->scalar_type() == ScalarType::Float && upstream->is_contiguous() &&
                        (upstream->numel() == 1 || upstream->numel() == work.units),
                    "kdkernels: upstream must have one value, or one a layer and sample");
    p.upstream = static_cast<const float*>(upstream->data_ptr());
    p.upstream_stride = upstream->numel() == 1 ? 0 : 1;
  }
  auto real = std::make_optional(ScalarType::Float);
  work.parts = torch::stable::new_empty(like, {first_part + count}, real);
  p.parts = static_cast<float*>(work.parts.data_ptr()) + first_part;
  return work;
}

}  // namespace kd::features
