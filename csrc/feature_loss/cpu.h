// One call of feature_loss on the CPU: what is prepared before its parallel region, and what is
// added up after it.
#pragma once

#include <cmath>
#include <deque>
#include <tuple>

#include "ops.h"

namespace kd::features {

// Work below this is not worth a thread. An element of a feature costs about a tenth of what
// grain() of csrc/arguments.h counts for a column.
constexpr int64_t kGrain = 1 << 16;

template <class Real>
class Work {
 public:
  Work(const Arguments& a, const OptionalTensor& upstream, const std::vector<bool>& wanted)
      : arguments_(a), reduction_(reduction_named(a.reduction)) {
    size_t n = a.students.size();
    STD_TORCH_CHECK(n >= 1 && a.teachers.size() == n && a.masks.size() == n &&
                        a.log_variances.size() == n && a.dims.size() == n &&
                        a.weights.size() == n && wanted.size() == 2 * n,
                    "kdkernels: lists of features must have one entry a layer");
    problem_.metric = metric_named(a.metric);
    problem_.normalize = a.normalize;
    problem_.beta = static_cast<Real>(a.beta);
    problem_.count = static_cast<int64_t>(n);
    const Real* weights =
        a.weights_tensor ? reals<Real>(*a.weights_tensor, "weights", problem_.count) : nullptr;
    int64_t units = 0, pieces = 0;
    layers_.reserve(n);
    gradients.reserve(2 * n);
    for (size_t i = 0; i < n; ++i) {
      gradients.push_back(wanted[i] ? torch::stable::empty_like(a.students[i])
                                    : torch::stable::new_empty(a.students[i], {0}));
    }
    for (size_t i = 0; i < n; ++i) {
      Layer<Real> layer =
          layer_of<Real>(a.students[i], a.teachers[i], wanted[i] ? &gradients[i] : nullptr,
                         a.masks[i], a.dims[i], problem_.metric, a.normalize);
      bool gaussian = problem_.metric == Metric::gaussian_nll;
      STD_TORCH_CHECK(gaussian == a.log_variances[i].has_value(),
                      "kdkernels: log_variance is of gaussian_nll, for every layer");
      int64_t positions = 1;
      for (int64_t k = 1; k < a.students[i].dim(); ++k) {
        positions *= k == a.dims[i] ? 1 : a.students[i].size(k);
      }
      layer.divisor =
          divisor_of(layer, problem_.metric, reduction_, positions, a.students[i].size(a.dims[i]));
      double weight = weights ? static_cast<double>(weights[i]) : a.weights[i];
      layer.scale = static_cast<Real>(weight / layer.divisor);
      layer.first_unit = units;
      units += layer.samples;
      divide(layer, problem_.metric, a.normalize, pieces);
      if (gaussian) variance(layer, *a.log_variances[i], wanted[n + i]);
      gradients.push_back(wanted[n + i]
                              ? torch::stable::new_empty(*a.log_variances[i], {layer.channels})
                              : torch::stable::new_empty(a.students[i], {0}));
      layers_.push_back(layer);
      starts_.push_back(cost_);
      cost_ += layer.pieces * layer.piece_cost;
    }
    problem_.layers = layers_.data();
    values_.resize(pieces);
    problem_.values = values_.data();
    if (upstream) {
      upstream_ = upstream->is_contiguous() ? *upstream : torch::stable::contiguous(*upstream);
      STD_TORCH_CHECK(upstream_->scalar_type() == real_type<Real> &&
                          (upstream_->numel() == 1 || upstream_->numel() == units),
                      "kdkernels: upstream must have one value, or one a layer and sample");
      problem_.upstream = static_cast<const Real*>(upstream_->data_ptr());
      problem_.upstream_stride = upstream_->numel() == 1 ? 0 : 1;
    }
  }

  int64_t cost() const { return cost_; }

  // The pieces that start in [begin, end) of the cost.
  void run(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < problem_.count; ++i) {
      const Layer<Real>& layer = layers_[i];
      auto piece_at = [&](int64_t cost) {
        int64_t k = (cost - starts_[i] + layer.piece_cost - 1) / layer.piece_cost;
        return cost <= starts_[i] ? 0 : k < layer.pieces ? k : layer.pieces;
      };
      int64_t first = piece_at(begin), last = piece_at(end);
      if (first == last) continue;
      if constexpr (std::is_same_v<Real, float>) {
        kernels().run_float(problem_, i, first, last);
      } else {
        kernels().run_double(problem_, i, first, last);
      }
    }
  }

  // (loss, parts), and the log-variances' gradients.
  std::tuple<Tensor, Tensor> finish() {
    auto real = std::make_optional(real_type<Real>);
    const Tensor& like = arguments_.students[0];
    bool none = reduction_ == Reduction::none;
    Tensor loss = torch::stable::new_empty(
        like,
        none ? std::vector<int64_t>{problem_.count, layers_[0].samples} : std::vector<int64_t>{},
        real);
    Tensor parts = torch::stable::new_empty(like, {problem_.count}, real);
    Real* losses = static_cast<Real*>(loss.data_ptr());
    double all = 0;
    for (int64_t i = 0; i < problem_.count; ++i) {
      const Layer<Real>& layer = layers_[i];
      int64_t pieces = layer.samples == 0 ? 0 : layer.pieces / layer.samples;  // of a sample
      double part = 0;
      for (int64_t sample = 0; sample < layer.samples; ++sample) {
        double sum = 0;
        for (int64_t k = 0; k < pieces; ++k) {
          sum += values_[layer.first_piece + sample * pieces + k];
        }
        double unit = times(static_cast<double>(layer.scale), sum);
        if (none) losses[layer.first_unit + sample] = static_cast<Real>(unit);
        part += unit;
      }
      static_cast<Real*>(parts.data_ptr())[i] = static_cast<Real>(part);
      all += part;
      if (gradients[problem_.count + i].numel() > 0) variance_gradient(i, layer, pieces);
    }
    if (!none) losses[0] = static_cast<Real>(all);
    return {loss, parts};
  }

  std::vector<Tensor> gradients;

 private:
  std::vector<Real>& keep(int64_t size) { return kept_.emplace_back(size); }

  void variance(Layer<Real>& layer, const Tensor& log_variance, bool wanted) {
    STD_TORCH_CHECK(log_variance.dim() == 1 && log_variance.size(0) == layer.channels,
                    "kdkernels: log_variance must have one value a channel");
    Real *values = keep(layer.channels).data(), *precision = keep(layer.channels).data();
    const char* data = static_cast<const char*>(log_variance.data_ptr());
    int64_t stride = log_variance.stride(0);
    for (int64_t c = 0; c < layer.channels; ++c) {
      values[c] = read(data, dtype_of(log_variance), c * stride);
      precision[c] = std::exp(-values[c]);
    }
    layer.log_variance = values;
    layer.precision = precision;
    if (wanted) layer.variance_sums = keep(layer.pieces * layer.channels).data();
  }

  static Real read(const char* data, Dtype dtype, int64_t i) {
    switch (dtype) {
      case Dtype::float64:
        return static_cast<Real>(reinterpret_cast<const double*>(data)[i]);
      case Dtype::float32:
        return reinterpret_cast<const float*>(data)[i];
      case Dtype::bfloat16:
        return from_bfloat16(reinterpret_cast<const uint16_t*>(data)[i]);
      case Dtype::float16:
        return from_float16(reinterpret_cast<const uint16_t*>(data)[i]);
    }
    return 0;
  }

  static void write(double x, char* data, Dtype dtype, int64_t i) {
    switch (dtype) {
      case Dtype::float64:
        reinterpret_cast<double*>(data)[i] = x;
        return;
      case Dtype::float32:
        reinterpret_cast<float*>(data)[i] = static_cast<float>(x);
        return;
      case Dtype::bfloat16:
        reinterpret_cast<uint16_t*>(data)[i] = to_bfloat16(static_cast<float>(x));
        return;
      case Dtype::float16:
        reinterpret_cast<uint16_t*>(data)[i] = to_float16(static_cast<float>(x));
        return;
    }
  }

  void variance_gradient(int64_t i, const Layer<Real>& layer, int64_t pieces) {
    const Tensor& gradient = gradients[problem_.count + i];
    std::vector<double> sums(layer.channels);
    for (int64_t k = 0; k < layer.pieces; ++k) {
      double factor = problem_.factor(layer, k / pieces);
      const Real* of_piece = layer.variance_sums + k * layer.channels;
      for (int64_t c = 0; c < layer.channels; ++c) {
        sums[c] += times(factor, static_cast<double>(of_piece[c]));
      }
    }
    for (int64_t c = 0; c < layer.channels; ++c) {
      write(sums[c], static_cast<char*>(gradient.data_ptr()), dtype_of(gradient), c);
    }
  }

  const Arguments& arguments_;
  Reduction reduction_;
  Problem<Real> problem_;
  std::vector<Layer<Real>> layers_;
  std::vector<int64_t> starts_;  // of each layer in the cost
  std::vector<double> values_;
  std::deque<std::vector<Real>> kept_;
  OptionalTensor upstream_;
  int64_t cost_ = 0;
};

}  // namespace kd::features
