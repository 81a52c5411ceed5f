// What the registered functions of feature_loss share between devices, and with
// joint_distillation_loss: tensors as the kernels' plain structs. The schemas and what every
// argument means are in kdkernels/ops/feature_loss/__init__.py.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../distillation_loss/ops.h"  // reduction_named
#include "../tensors.h"
#include "problem.h"

namespace kd::features {

// FEATURES, in the order of the schema.
struct Arguments {
  std::vector<Tensor> students, teachers;
  std::vector<OptionalTensor> masks, log_variances;
  std::vector<int64_t> dims;
  std::string metric;
  bool normalize;
  double beta;
  std::vector<double> weights;
  OptionalTensor weights_tensor;
  std::string reduction;
};

#define KD_FEATURES                                                                              \
  std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<OptionalTensor> masks, \
      std::vector<OptionalTensor> log_variances, std::vector<int64_t> dims, std::string metric,  \
      bool normalize, double beta, std::vector<double> weights, OptionalTensor weights_tensor,   \
      std::string feature_reduction
#define KD_TAKE_FEATURES                                                              \
  kd::features::Arguments {                                                           \
    students, teachers, masks, log_variances, dims, metric, normalize, beta, weights, \
        weights_tensor, feature_reduction                                             \
  }

inline Metric metric_named(const std::string& name) {
  int which = 0;
  for (const char* known : metric_names) {
    if (name == known) return static_cast<Metric>(which);
    ++which;
  }
  STD_TORCH_CHECK(false, "kdkernels: metric '", name, "' is unknown to the C++ library");
}

inline bool is_double(const Arguments& a) {
  auto wide = [](const Tensor& x) { return dtype_of(x) == Dtype::float64; };
  return std::any_of(a.students.begin(), a.students.end(), wide) ||
         std::any_of(a.teachers.begin(), a.teachers.end(), wide);
}

// A dimension of a layer, with its stride in everything that has it.
struct Dimension {
  int64_t size, student, teacher, gradient, mask;

  // Whether this one and the next, inside it, are one.
  bool contains(const Dimension& next) const {
    return student == next.student * next.size && teacher == next.teacher * next.size &&
           gradient == next.gradient * next.size && mask == next.mask * next.size;
  }
};

// Outermost first, neighbours merged, none of size 1.
inline std::vector<Dimension> merged(std::vector<Dimension> all) {
  auto outermost = [](const Dimension& d) { return d.student == 0 ? INT64_MAX : d.student; };
  std::stable_sort(all.begin(), all.end(), [&](const Dimension& a, const Dimension& b) {
    return outermost(a) > outermost(b);
  });
  std::vector<Dimension> result;
  for (const Dimension& d : all) {
    if (d.size == 1) continue;
    if (!result.empty() && result.back().contains(d)) {
      int64_t size = result.back().size * d.size;
      result.back() = d;
      result.back().size = size;
    } else {
      result.push_back(d);
    }
  }
  return result;
}

inline Feature feature_of(const Tensor& tensor) {
  return {static_cast<char*>(const_cast<void*>(tensor.data_ptr())), dtype_of(tensor), {}};
}

// One layer but for what depends on numbers (log-variance, divisor, scale). gradient: null where
// not wanted.
template <class Real>
Layer<Real> layer_of(const Tensor& student, const Tensor& teacher, const Tensor* gradient,
                     const OptionalTensor& mask, int64_t dim, Metric metric, bool normalize) {
  int64_t rank = student.dim();
  STD_TORCH_CHECK(rank >= 2 && teacher.dim() == rank && dim >= 1 && dim < rank,
                  "kdkernels: a layer's feature_dim must be one of its dimensions but the first");
  STD_TORCH_CHECK(!mask || (mask->dim() == rank - 1 && mask->scalar_type() == real_type<Real>),
                  "kdkernels: a mask must have its layer's positions and the dtype that the op "
                  "computes in");
  Layer<Real> layer;
  layer.samples = student.size(0);
  layer.channels = student.size(dim);
  layer.teacher_channels = teacher.size(dim);
  layer.student = feature_of(student);
  layer.teacher = feature_of(teacher);
  if (gradient != nullptr) layer.gradient = feature_of(*gradient);
  if (mask) layer.mask = static_cast<const Real*>(mask->data_ptr());

  auto dimension = [&](int64_t k) {
    int64_t of_mask = k < dim ? k : k - 1;
    return Dimension{student.size(k), student.stride(k), teacher.stride(k),
                     gradient ? gradient->stride(k) : student.stride(k),
                     mask && k != dim ? mask->stride(of_mask) : 0};
  };
  std::vector<Dimension> positions;
  for (int64_t k = 0; k < rank; ++k) {
    STD_TORCH_CHECK(k == dim ? metric == Metric::attention || student.size(k) == teacher.size(k)
                             : student.size(k) == teacher.size(k),
                    "kdkernels: a layer's student and teacher must have one shape");
    if (k > 0 && k != dim) positions.push_back(dimension(k));
    STD_TORCH_CHECK(!mask || k == dim || mask->size(k < dim ? k : k - 1) == student.size(k),
                    "kdkernels: a mask must have its layer's positions");
  }
  Dimension sample = dimension(0), channel = dimension(dim);
  if (!mask) {  // then it has the student's strides, so that it hinders no merging
    for (Dimension& d : positions) d.mask = d.student;
    channel.mask = channel.student;
  }
  bool elementwise = (metric == Metric::l2 || metric == Metric::smooth_l1) && !normalize && !mask;
  if (elementwise) {
    std::vector<Dimension> with_channels = positions;
    with_channels.push_back(channel);
    with_channels = merged(with_channels);
    if (with_channels.size() <= 1) {
      positions = with_channels;
      channel = {1, 0, 0, 0, 0};
      layer.channels = layer.teacher_channels = 1;
    }
  }
  positions = merged(positions);
  STD_TORCH_CHECK(positions.size() <= kOuter + 1, "kdkernels: a layer has too many dimensions");
  auto fill = [&](Strides& strides, int64_t Dimension::* stride) {
    strides.sample = sample.*stride;
    strides.channel = channel.*stride;
    int64_t outers = static_cast<int64_t>(positions.size()) - 1;
    if (outers >= 0) strides.inner = positions[outers].*stride;
    for (int64_t k = 0; k < outers; ++k) strides.outer[kOuter - outers + k] = positions[k].*stride;
  };
  fill(layer.student.strides, &Dimension::student);
  fill(layer.teacher.strides, &Dimension::teacher);
  fill(layer.gradient.strides, &Dimension::gradient);
  if (mask) fill(layer.mask_strides, &Dimension::mask);
  int64_t outers = static_cast<int64_t>(positions.size()) - 1;
  if (outers >= 0) layer.inner = positions[outers].size;
  for (int64_t k = 0; k < outers; ++k) layer.outer[kOuter - outers + k] = positions[k].size;
  return layer;
}

}  // namespace kd::features
