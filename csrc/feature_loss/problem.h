// One call of feature_loss as plain pointers and sizes, and the kernels that serve it. No torch
// header. What every metric is: kdkernels/ops/feature_loss/__init__.py.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../distillation_loss/problem.h"  // Reduction

namespace kd::features {

enum class Metric { l2, smooth_l1, cosine, attention, gaussian_nll };

constexpr const char* metric_names[] = {"l2", "smooth_l1", "cosine", "attention", "gaussian_nll"};

// A vector shorter than this has no direction: it counts as 0 and gets gradient 0.
constexpr double kSmallestNorm = 1e-12;

// One feature as it lies in memory: (samples, outer, inner, channels), strides in elements. The two
// position dimensions are all that is left of any number of them; `inner` is the one with the
// smaller stride in the student.
struct Feature {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t sample = 0, outer = 0, inner = 0, channel = 0;
};

template <class Real>
struct Layer {
  int64_t samples = 0, outer = 1, inner = 1, channels = 0;
  int64_t teacher_channels = 0;  // differs in Metric::attention only
  Feature student, teacher;
  Feature gradient;  // no data where not wanted
  // One weight a position, of these strides (0 where one stands for many); none: all 1.
  const Real* mask = nullptr;
  int64_t mask_sample = 0, mask_outer = 0, mask_inner = 0;
  const Real* log_variance = nullptr;  // (channels), contiguous
  Real* variance_gradient = nullptr;   // (channels), or none
  int64_t first_unit = 0;              // of its samples in Problem::units
  Real scale = 0;                      // weight/divisor, from `prepare`

  KD_INLINE int64_t positions() const { return outer * inner; }
};

template <class Real>
struct Problem {
  Layer<Real>* layers = nullptr;
  int64_t count = 0;
  Metric metric = Metric::l2;
  bool normalize = false;
  Real beta = 1;
  Reduction reduction = Reduction::batchmean;
  // One weight a layer: numbers, or a tensor.
  const double* weights = nullptr;
  const Real* weights_tensor = nullptr;
  Real* units = nullptr;  // one a layer and sample: its part of the loss, scale included
  // The factor of the gradients: none (1), one (stride 0), or one a unit (stride 1).
  const Real* upstream = nullptr;
  int64_t upstream_stride = 0;
};

}  // namespace kd::features
