// The kernels of feature_loss.
#pragma once

#include "../feature_loss/problem.h"
#include "arrays.h"

namespace kd::features {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

namespace {

using namespace bindings;

const Kernels& kernels_at(const std::string& name) {
  CpuLevel level = level_named(name);
  auto cpu_level = [level] { return level; };
  return KD_AT_CPU_LEVEL(kernels);
}

// (samples, outer, inner, channels) of any strides.
Feature feature_of(const py::array& array) {
  if (array.ndim() != 4) throw py::value_error("a feature must have four dimensions");
  Feature feature{data_of(array), dtype_of(array), {}};
  feature.strides.sample = stride_of(array, 0);
  feature.strides.outer[kOuter - 1] = stride_of(array, 1);
  feature.strides.inner = stride_of(array, 2);
  feature.strides.channel = stride_of(array, 3);
  return feature;
}

// One layer. losses: (samples) float64; variance_sums: (channels) float64, summed over the pieces.
template <class Real>
void run_as(const std::string& level, int threads, Metric metric, bool normalize, double beta,
            const py::array& student, const py::array& teacher, const OptionalArray& gradient,
            const OptionalArray& mask, const OptionalArray& log_variance,
            const OptionalArray& precision, py::array_t<double> losses,
            py::array_t<double> variance_sums) {
  Layer<Real> layer;
  layer.samples = student.shape(0);
  layer.outer[kOuter - 1] = student.shape(1);
  layer.inner = student.shape(2);
  layer.channels = student.shape(3);
  layer.teacher_channels = teacher.shape(3);
  layer.student = feature_of(student);
  layer.teacher = feature_of(teacher);
  if (gradient) layer.gradient = feature_of(*gradient);
  if (mask) {
    layer.mask = static_cast<const Real*>(mask->data());
    layer.mask_strides.sample = stride_of(*mask, 0);
    layer.mask_strides.outer[kOuter - 1] = stride_of(*mask, 1);
    layer.mask_strides.inner = stride_of(*mask, 2);
  }
  layer.scale = 1;
  int64_t pieces = 0;
  divide(layer, metric, normalize, pieces);
  std::vector<double> values(pieces);
  std::vector<Real> sums(log_variance ? pieces * layer.channels : 0);
  if (log_variance) {
    layer.log_variance = reals<Real>(*log_variance, layer.channels).data;
    layer.precision = reals<Real>(*precision, layer.channels).data;
    layer.variance_sums = sums.data();
  }
  Problem<Real> problem;
  problem.layers = &layer;
  problem.count = 1;
  problem.metric = metric;
  problem.normalize = normalize;
  problem.beta = static_cast<Real>(beta);
  problem.values = values.data();
  const Kernels& table = kernels_at(level);
  on_threads(threads, pieces, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    if constexpr (sizeof(Real) == 4) {
      table.run_float(problem, 0, begin, end);
    } else {
      table.run_double(problem, 0, begin, end);
    }
  });
  for (int64_t k = 0; k < pieces; ++k) {
    losses.mutable_at(k / (pieces / layer.samples)) += values[k];
    for (int64_t c = 0; log_variance && c < layer.channels; ++c) {
      variance_sums.mutable_at(c) += sums[k * layer.channels + c];
    }
  }
}

void run(const std::string& level, int threads, const std::string& metric, bool normalize,
         double beta, py::array student, py::array teacher, OptionalArray gradient,
         OptionalArray mask, OptionalArray log_variance, OptionalArray precision,
         py::array_t<double> losses, py::array_t<double> variance_sums) {
  int which = 0;
  while (metric != metric_names[which]) ++which;
  bool wide = dtype_of(student) == Dtype::float64 || dtype_of(teacher) == Dtype::float64;
  (wide ? run_as<double> : run_as<float>)(level, threads, static_cast<Metric>(which), normalize,
                                          beta, student, teacher, gradient, mask, log_variance,
                                          precision, losses, variance_sums);
}

}  // namespace

inline void bind(py::module_ m) {
  using py::literals::operator""_a;
  m.def("run", &run, "level"_a, "threads"_a, "metric"_a, "normalize"_a, "beta"_a, "student"_a,
        "teacher"_a, "gradient"_a, "mask"_a, "log_variance"_a, "precision"_a, "losses"_a,
        "variance_sums"_a);
}

}  // namespace kd::features
