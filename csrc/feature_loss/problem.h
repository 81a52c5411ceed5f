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

// Position dimensions beside the inner one.
constexpr int kOuter = 3;

// One feature, or its mask, as it lies in memory: strides in elements.
struct Strides {
  int64_t sample = 0, outer[kOuter] = {}, inner = 0, channel = 0;
};
struct Feature {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  Strides strides;
};

// (samples, outer…, inner, channels). The position dimensions are what is left of any number of
// them once neighbours are merged; `inner` is the one with the smallest stride in the student.
// Where channels need no distinction from positions (l2 and smooth_l1, neither normalised nor
// masked, everything dense) they are merged too, and `channels` is 1.
template <class Real>
struct Layer {
  int64_t samples = 0, outer[kOuter] = {1, 1, 1}, inner = 1, channels = 1;
  int64_t teacher_channels = 1;  // differs from `channels` in Metric::attention only
  Feature student, teacher;
  Feature gradient;            // no data where not wanted
  const Real* mask = nullptr;  // one weight a position; none: all 1
  Strides mask_strides;
  const Real* log_variance = nullptr;  // (channels)
  const Real* precision = nullptr;     // e^(−log_variance)
  double divisor = 1;
  Real scale = 0;          // weight/divisor
  int64_t first_unit = 0;  // of its samples in Problem::units

  KD_INLINE int64_t outer_size() const { return outer[0] * outer[1] * outer[2]; }
  KD_INLINE int64_t positions() const { return outer_size() * inner; }
  KD_INLINE int64_t offset(const Strides& s, int64_t sample, int64_t o) const {
    return sample * s.sample + o / (outer[1] * outer[2]) * s.outer[0] +
           o / outer[2] % outer[1] * s.outer[1] + o % outer[2] * s.outer[2];
  }

  // How the CPU divides the layer: pieces of a sample, each some positions of one outer index, or
  // for Metric::attention the sample. They depend on the layer's shape alone.
  int64_t piece_positions = 1, pieces_a_line = 1, pieces = 0, first_piece = 0, piece_cost = 1;
  Real* variance_sums = nullptr;  // (pieces, channels): ∂/∂log_variance before the scale
};

template <class Real>
struct Problem {
  Layer<Real>* layers = nullptr;
  int64_t count = 0;
  Metric metric = Metric::l2;
  bool normalize = false;
  Real beta = 1;
  // The factor of the gradients: none (1), one (stride 0), or one a unit, which is a layer and
  // sample (stride 1).
  const Real* upstream = nullptr;
  int64_t upstream_stride = 0;
  double* values = nullptr;  // of every piece, before the scale

  KD_INLINE Real factor(const Layer<Real>& layer, int64_t sample) const {
    Real up = upstream ? upstream[(layer.first_unit + sample) * upstream_stride] : Real(1);
    return layer.scale == 0 ? Real(0) : layer.scale * up;
  }
};

// What a layer's sum is divided by, from its mask and its sizes before any merging.
template <class Real>
double divisor_of(const Layer<Real>& layer, Metric metric, Reduction reduction, int64_t positions,
                  int64_t channels);

// Fills piece_positions … piece_cost; the number of pieces so far goes in and out.
template <class Real>
void divide(Layer<Real>& layer, Metric metric, bool normalize, int64_t& pieces);

// Pieces begin ≤ k < end of a layer: values, gradient, variance_sums.
struct Kernels {
  void (*run_float)(const Problem<float>&, int64_t layer, int64_t begin, int64_t end);
  void (*run_double)(const Problem<double>&, int64_t layer, int64_t begin, int64_t end);
};

const Kernels& kernels();  // for this machine's CPU level

}  // namespace kd::features
