// The kernels of feature_loss for one instruction set (KD_TARGET). Included by cpu_<level>.cpp,
// nowhere else.
//
// A piece is a block of positions × channels. It is gone through in lines: along the channels of a
// position where these are neighbours in the student's memory (tokens, channels_last), else along
// positions, for each channel (NCHW). Whatever else has another stride is gathered.
#pragma once

#include <cmath>

#include "../first_touch.h"
#include "../rows.h"
#include "../scratch.h"
#include "problem.h"

namespace kd::features {
namespace {

// ---- lines of any stride ----

template <class From, class Real, class Convert>
KD_TARGET void gather(const From* x, int64_t stride, int64_t n, Real* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(convert(x[i * stride]));
}

// n elements as Real: where they lie if they are neighbours of that type, else in `buffer`.
template <class Real>
KD_TARGET const Real* line_of(const Feature& feature, int64_t offset, int64_t stride, int64_t n,
                              Real* buffer) {
  const char* data = feature.data + offset * size_of(feature.dtype);
  if (stride == 1) return load(Row{data, feature.dtype, -1}, 0, n, buffer);
  switch (feature.dtype) {
    case Dtype::float64:
      gather(reinterpret_cast<const double*>(data), stride, n, buffer, [](double x) { return x; });
      break;
    case Dtype::float32:
      gather(reinterpret_cast<const float*>(data), stride, n, buffer, [](float x) { return x; });
      break;
    case Dtype::bfloat16:
      gather(reinterpret_cast<const uint16_t*>(data), stride, n, buffer,
             [](uint16_t x) { return from_bfloat16(x); });
      break;
    case Dtype::float16:
      gather(reinterpret_cast<const uint16_t*>(data), stride, n, buffer,
             [](uint16_t x) { return from_float16(x); });
      break;
  }
  return buffer;
}

// Where a line of the gradient may be computed: in place if it holds neighbouring Reals.
template <class Real>
KD_TARGET Real* output_of(const Feature& gradient, int64_t offset, int64_t stride, Real* buffer) {
  constexpr Dtype own = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;
  if (gradient.dtype != own || stride != 1) return buffer;
  return reinterpret_cast<Real*>(gradient.data) + offset;
}

template <class Real>
KD_TARGET void put_line(const Real* x, const Feature& gradient, int64_t offset, int64_t stride,
                        int64_t n) {
  int64_t size = size_of(gradient.dtype);
  char* data = gradient.data + offset * size;
  if (reinterpret_cast<const char*>(x) == data) return;
  if (stride == 1) return store(x, data, gradient.dtype, 0, n);
  for (int64_t i = 0; i < n; ++i) store(x + i, data + i * stride * size, gradient.dtype, 0, 1);
}

// ---- φ of one difference ----

template <class Real>
struct SquareOf {
  KD_INLINE Real value(Real d) const { return d * d; }
  KD_INLINE Real slope(Real d) const { return 2 * d; }
};

template <class Real>
struct HuberOf {  // smooth L1
  Real beta, inverse;
  explicit HuberOf(Real b) : beta(b), inverse(b > 0 ? 1 / b : Real(0)) {}
  KD_INLINE Real value(Real d) const {
    Real size = absolute(d);
    return size >= beta ? size - Real(0.5) * beta : Real(0.5) * d * d * inverse;
  }
  KD_INLINE Real slope(Real d) const {
    Real sign = d > 0 ? Real(1) : d < 0 ? Real(-1) : d;  // NaN stays
    return absolute(d) >= beta ? sign : d * inverse;
  }
};

// ---- loops over one line ----

// Σ φ(s − t), and out = φ′·factor where there is an out. Four terms are added in Real before they
// go to the sum in double: converting every one took twice as long.
template <bool gradient, class Phi, class Real>
KD_TARGET __attribute__((noinline)) double elementwise_loop(const Real* s, const Real* t, int64_t n,
                                                            Phi phi, Real factor, Real* out) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const Real *a = s + i, *b = t + i;
    Real* to = out + i;
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      Real value[4];
      for (int64_t k = 0; k < 4; ++k) {
        Real d = a[j + k * kLanes] - b[j + k * kLanes];
        value[k] = phi.value(d);
        if (gradient) to[j + k * kLanes] = phi.slope(d) * factor;
      }
      sums[j] += static_cast<double>((value[0] + value[1]) + (value[2] + value[3]));
    }
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < n; ++j) {
    Real d = s[j] - t[j];
    sum += static_cast<double>(phi.value(d));
    if (gradient) out[j] = phi.slope(d) * factor;
  }
  for (double lane : sums) sum += lane;
  return sum;
}

template <class Phi, class Real>
KD_TARGET double elementwise(const Real* s, const Real* t, int64_t n, Phi phi, Real factor,
                             Real* out) {
  return out == nullptr ? elementwise_loop<false>(s, t, n, phi, factor, out)
                        : elementwise_loop<true>(s, t, n, phi, factor, out);
}

// The same with a weight for each element; 0 hides it.
template <class Phi, class Real>
KD_TARGET __attribute__((noinline)) double elementwise_weighted(const Real* s, const Real* t,
                                                                const Real* w, int64_t n, Phi phi,
                                                                Real factor, Real* out) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    Real d = w[i] != 0 ? s[i] - t[i] : Real(0);
    sum += static_cast<double>(phi.value(d) * w[i]);
  }
  if (out == nullptr) return sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real d = s[i] - t[i];
    out[i] = w[i] != 0 ? phi.slope(d) * (w[i] * factor) : Real(0);
  }
  return sum;
}

// Along channels: Σ ½(d²·precision + ℓ), and for each channel ½(1 − d²·precision)·weight.
KD_LOOP double gaussian(const Real* s, const Real* t, const Real* precision,
                        const Real* log_variance, int64_t n, Real weight, Real factor, Real* out,
                        Real* variance_sums) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    Real d = s[i] - t[i], square = d * d * precision[i];
    sum += static_cast<double>(Real(0.5) * (square + log_variance[i]));
  }
  if (variance_sums != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      Real d = s[i] - t[i];
      variance_sums[i] += Real(0.5) * weight * (1 - d * d * precision[i]);
    }
  }
  if (out != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (s[i] - t[i]) * precision[i] * factor;
  }
  return sum;
}

KD_LOOP double squares(const Real* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// sums[i] += x[i]², where w (if any) is not 0.
KD_LOOP void add_squares(const Real* x, const Real* w, double* sums, int64_t n) {
  if (w == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sums[i] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double value = w[i] != 0 ? static_cast<double>(x[i]) : 0;
    sums[i] += value * value;
  }
}

// Σ φ and Σ φ′·ŝ of one vector, d = ŝ − t̂.
template <class Phi, class Real>
KD_TARGET __attribute__((noinline)) void unit_sums(const Real* s, const Real* t, int64_t n, Phi phi,
                                                   Real inverse_s, Real inverse_t, double& value,
                                                   double& dot) {
  double values = 0, dots = 0;
#pragma omp simd reduction(+ : values, dots)
  for (int64_t i = 0; i < n; ++i) {
    Real unit = s[i] * inverse_s, d = unit - t[i] * inverse_t;
    values += static_cast<double>(phi.value(d));
    dots += static_cast<double>(phi.slope(d) * unit);
  }
  value += values;
  dot += dots;
}

template <class Phi, class Real>
KD_TARGET __attribute__((noinline)) void unit_gradient(const Real* s, const Real* t, int64_t n,
                                                       Phi phi, Real inverse_s, Real inverse_t,
                                                       Real dot, Real factor, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real unit = s[i] * inverse_s, d = unit - t[i] * inverse_t;
    out[i] = (phi.slope(d) - unit * dot) * factor;
  }
}

// The same for one channel of n positions. A masked position has both inverses 0 and reads as 0.
template <class Real>
struct Units {
  const Real *inverse_s, *inverse_t, *counts;  // counts: 0 hides a position
};

template <class Phi, class Real>
KD_TARGET __attribute__((noinline)) void add_unit_sums(const Real* s, const Real* t, int64_t n,
                                                       Phi phi, Units<Real> units, double* values,
                                                       double* dots) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real unit = s[i] * units.inverse_s[i], d = unit - t[i] * units.inverse_t[i];
    values[i] += units.counts[i] != 0 ? static_cast<double>(phi.value(d)) : 0;
    dots[i] += units.counts[i] != 0 ? static_cast<double>(phi.slope(d) * unit) : 0;
  }
}

// factors: 0 where masked, or where the student has no direction.
template <class Phi, class Real>
KD_TARGET __attribute__((noinline)) void unit_gradients(const Real* s, const Real* t, int64_t n,
                                                        Phi phi, Units<Real> units,
                                                        const Real* dots, const Real* factors,
                                                        Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real unit = s[i] * units.inverse_s[i], d = unit - t[i] * units.inverse_t[i];
    Real gradient = (phi.slope(d) - unit * dots[i]) * factors[i];
    out[i] = units.counts[i] != 0 ? gradient : Real(0);
  }
}

KD_LOOP void times_map(const Real* x, const Real* map, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = map[i] == 0 ? Real(0) : x[i] * map[i];
}

inline double inverse_norm(double sum_of_squares) {
  double norm = std::sqrt(sum_of_squares);
  return norm < kSmallestNorm ? 0 : 1 / norm;  // NaN stays
}

// ---- one piece ----

template <class Real>
class PieceKernel {
 public:
  PieceKernel(const Problem<Real>& problem, const Layer<Real>& layer)
      : p_(problem), layer_(layer), along_channels_(layer.student.strides.channel == 1) {
    whole_ = p_.metric == Metric::attention;
    int64_t line = along_channels_ && !whole_ ? kBlock : layer.piece_positions;
    if (whole_) line = layer.inner > kBlock ? layer.inner : kBlock;
    int64_t positions = whole_ ? layer.positions() : layer.piece_positions;
    thread_local Scratch<Real> scratch;
    thread_local Scratch<double> sums;
    Real* memory = scratch.get(3 * line + 5 * positions);
    auto take = [&memory](int64_t size) {
      Real* piece = memory;
      memory += size;
      return piece;
    };
    s_ = take(line);
    t_ = take(line);
    out_ = take(line);
    weights_ = take(positions);
    inverse_s_ = take(positions);
    inverse_t_ = take(positions);
    dots_ = take(positions);
    factors_ = take(positions);
    double* more = sums.get(4 * positions);
    square_s_ = more;
    square_t_ = more + positions;
    value_ = more + 2 * positions;
    dot_ = more + 3 * positions;
  }

  KD_TARGET void run(int64_t piece) {
    double& value = p_.values[layer_.first_piece + piece];
    int64_t line = whole_ ? piece : piece / layer_.pieces_a_line;
    sample_ = whole_ ? piece : line / layer_.outer_size();
    outer_ = whole_ ? 0 : line % layer_.outer_size();
    begin_ = whole_ ? 0 : piece % layer_.pieces_a_line * layer_.piece_positions;
    n_ = layer_.inner - begin_ < layer_.piece_positions ? layer_.inner - begin_
                                                        : layer_.piece_positions;
    factor_ = p_.factor(layer_, sample_);
    if (layer_.variance_sums != nullptr) {
      variance_sums_ = layer_.variance_sums + piece * layer_.channels;
      for (int64_t c = 0; c < layer_.channels; ++c) variance_sums_[c] = 0;
    }
    if (layer_.scale == 0) {  // nothing is read
      value = 0;
      return clear();
    }
    switch (p_.metric) {
      case Metric::l2:
        value = p_.normalize ? normalised(SquareOf<Real>()) : plain(SquareOf<Real>());
        break;
      case Metric::smooth_l1:
        value = p_.normalize ? normalised(HuberOf<Real>(p_.beta)) : plain(HuberOf<Real>(p_.beta));
        break;
      case Metric::cosine:
        value = normalised(SquareOf<Real>());
        break;
      case Metric::attention:
        value = attention();
        break;
      case Metric::gaussian_nll:
        value = along_channels_ ? gaussian_rows() : gaussian_columns();
        break;
    }
  }

 private:
  bool wants_gradient() const { return layer_.gradient.data != nullptr; }

  int64_t offset(const Strides& strides, int64_t position, int64_t channel) const {
    return layer_.offset(strides, sample_, outer_) + (begin_ + position) * strides.inner +
           channel * strides.channel;
  }

  // The weights of the piece's positions, or null where all are 1.
  KD_TARGET const Real* weights() {
    if (layer_.mask == nullptr) return nullptr;
    const Real* mask = layer_.mask + offset(layer_.mask_strides, 0, 0);
    int64_t stride = layer_.mask_strides.inner;
    if (stride == 1) return mask;
    for (int64_t i = 0; i < n_; ++i) weights_[i] = mask[i * stride];
    return weights_;
  }

  // (s, t, out) of each block of channels of a position: block(s, t, out, first channel, n).
  template <class Block>
  KD_TARGET void along_channels(int64_t position, bool gradient, Block block) {
    const Feature &s = layer_.student, &t = layer_.teacher, &g = layer_.gradient;
    for (int64_t start = 0; start < layer_.channels; start += kBlock) {
      int64_t n = layer_.channels - start < kBlock ? layer_.channels - start : kBlock;
      line(s, t, g, offset(s.strides, position, start), offset(t.strides, position, start),
           gradient ? offset(g.strides, position, start) : 0, s.strides.channel, t.strides.channel,
           g.strides.channel, n, gradient,
           [&](const Real* a, const Real* b, Real* out) { block(a, b, out, start, n); });
    }
  }

  // (s, t, out) of the piece's positions in one channel: block(s, t, out).
  template <class Block>
  KD_TARGET void along_positions(int64_t channel, bool gradient, Block block) {
    const Feature &s = layer_.student, &t = layer_.teacher, &g = layer_.gradient;
    line(s, t, g, offset(s.strides, 0, channel), offset(t.strides, 0, channel),
         gradient ? offset(g.strides, 0, channel) : 0, s.strides.inner, t.strides.inner,
         g.strides.inner, n_, gradient, block);
  }

  template <class Block>
  KD_TARGET void line(const Feature& s, const Feature& t, const Feature& g, int64_t at_s,
                      int64_t at_t, int64_t at_g, int64_t stride_s, int64_t stride_t,
                      int64_t stride_g, int64_t n, bool gradient, Block block) {
    const Real* a = line_of(s, at_s, stride_s, n, s_);
    const Real* b = line_of(t, at_t, stride_t, n, t_);
    Real* out = gradient ? output_of(g, at_g, stride_g, out_) : nullptr;
    block(a, b, out);
    if (gradient) put_line(out, g, at_g, stride_g, n);
  }

  KD_TARGET void clear_position(int64_t position) {
    if (!wants_gradient()) return;
    const Feature& g = layer_.gradient;
    for (int64_t start = 0; start < layer_.channels; start += kBlock) {
      int64_t n = layer_.channels - start < kBlock ? layer_.channels - start : kBlock;
      for (int64_t i = 0; i < n; ++i) out_[i] = 0;
      put_line(out_, g, offset(g.strides, position, start), g.strides.channel, n);
    }
  }

  KD_TARGET void clear() {
    if (!wants_gradient()) return;
    int64_t lines = whole_ ? layer_.outer_size() : 1;
    for (int64_t o = 0; o < lines; ++o) {
      if (whole_) {
        outer_ = o;
        n_ = layer_.inner;
      }
      const Feature& g = layer_.gradient;
      for (int64_t i = 0; i < n_ && !along_channels_; ++i) out_[i] = 0;
      for (int64_t c = 0; c < layer_.channels && !along_channels_; ++c) {
        put_line(out_, g, offset(g.strides, 0, c), g.strides.inner, n_);
      }
      for (int64_t i = 0; i < n_ && along_channels_; ++i) clear_position(i);
    }
  }

  template <class Phi>
  KD_TARGET double plain(Phi phi) {
    const Real* w = weights();
    double value = 0;
    if (!along_channels_) {
      for (int64_t c = 0; c < layer_.channels; ++c) {
        along_positions(c, wants_gradient(), [&](const Real* s, const Real* t, Real* out) {
          value += w == nullptr ? elementwise(s, t, n_, phi, factor_, out)
                                : elementwise_weighted(s, t, w, n_, phi, factor_, out);
        });
      }
      return value;
    }
    for (int64_t i = 0; i < n_; ++i) {
      Real weight = w == nullptr ? Real(1) : w[i];
      if (weight == 0) {
        clear_position(i);
        continue;
      }
      double sum = 0;
      along_channels(i, wants_gradient(),
                     [&](const Real* s, const Real* t, Real* out, int64_t, int64_t n) {
                       sum += elementwise(s, t, n, phi, factor_ * weight, out);
                     });
      value += sum * weight;
    }
    return value;
  }

  KD_TARGET double gaussian_rows() {
    const Real* w = weights();
    double value = 0;
    for (int64_t i = 0; i < n_; ++i) {
      Real weight = w == nullptr ? Real(1) : w[i];
      if (weight == 0) {
        clear_position(i);
        continue;
      }
      double sum = 0;
      along_channels(
          i, wants_gradient(), [&](const Real* s, const Real* t, Real* out, int64_t c, int64_t n) {
            sum += gaussian(s, t, layer_.precision + c, layer_.log_variance + c, n, weight,
                            factor_ * weight, out,
                            layer_.variance_sums == nullptr ? nullptr : variance_sums_ + c);
          });
      value += sum * weight;
    }
    return value;
  }

  KD_TARGET double gaussian_columns() {
    const Real* w = weights();
    double value = 0, weight = 0;
    for (int64_t i = 0; i < n_; ++i) weight += w == nullptr ? Real(1) : w[i];
    if (weight == 0) {  // all masked: no variance, however large, makes this NaN
      clear();
      return 0;
    }
    for (int64_t c = 0; c < layer_.channels; ++c) {
      Real precision = layer_.precision[c], factor = factor_ * precision * Real(0.5);
      along_positions(c, wants_gradient(), [&](const Real* s, const Real* t, Real* out) {
        SquareOf<Real> phi;
        double square = w == nullptr ? elementwise(s, t, n_, phi, factor, out)
                                     : elementwise_weighted(s, t, w, n_, phi, factor, out);
        square *= precision;
        value += 0.5 * (square + weight * layer_.log_variance[c]);
        if (layer_.variance_sums != nullptr) {
          variance_sums_[c] = static_cast<Real>(0.5 * (weight - square));
        }
      });
    }
    return value;
  }

  template <class Phi>
  KD_TARGET double normalised(Phi phi) {
    return along_channels_ ? normalised_rows(phi) : normalised_columns(phi);
  }

  // What a vector's loss is from Σ φ: 1 − cos = ½·‖ŝ − t̂‖², without its cancellation where the two
  // are close.
  double unit_value(double sum, double inverse_s, double inverse_t) const {
    if (p_.metric != Metric::cosine) return sum;
    return inverse_s == 0 || inverse_t == 0 ? 1 : 0.5 * sum;
  }

  template <class Phi>
  KD_TARGET double normalised_rows(Phi phi) {
    const Real* w = weights();
    Real slope_factor = p_.metric == Metric::cosine ? Real(0.5) : Real(1);
    double value = 0;
    for (int64_t i = 0; i < n_; ++i) {
      Real weight = w == nullptr ? Real(1) : w[i];
      if (weight == 0) {
        clear_position(i);
        continue;
      }
      double square_s = 0, square_t = 0, sum = 0, dot = 0;
      along_channels(i, false, [&](const Real* s, const Real* t, Real*, int64_t, int64_t n) {
        square_s += squares(s, n);
        square_t += squares(t, n);
      });
      Real inverse_s = static_cast<Real>(inverse_norm(square_s));
      Real inverse_t = static_cast<Real>(inverse_norm(square_t));
      along_channels(i, false, [&](const Real* s, const Real* t, Real*, int64_t, int64_t n) {
        unit_sums(s, t, n, phi, inverse_s, inverse_t, sum, dot);
      });
      value += weight * unit_value(sum, inverse_s, inverse_t);
      if (!wants_gradient()) continue;
      if (inverse_s == 0) {
        clear_position(i);
        continue;
      }
      along_channels(i, true, [&](const Real* s, const Real* t, Real* out, int64_t, int64_t n) {
        unit_gradient(s, t, n, phi, inverse_s, inverse_t, static_cast<Real>(dot),
                      factor_ * weight * slope_factor * inverse_s, out);
      });
    }
    return value;
  }

  template <class Phi>
  KD_TARGET double normalised_columns(Phi phi) {
    const Real* w = weights();
    for (int64_t i = 0; i < n_; ++i) square_s_[i] = square_t_[i] = value_[i] = dot_[i] = 0;
    for (int64_t c = 0; c < layer_.channels; ++c) {
      along_positions(c, false, [&](const Real* s, const Real* t, Real*) {
        add_squares(s, w, square_s_, n_);
        add_squares(t, w, square_t_, n_);
      });
    }
    for (int64_t i = 0; i < n_; ++i) {
      inverse_s_[i] = static_cast<Real>(inverse_norm(square_s_[i]));
      inverse_t_[i] = static_cast<Real>(inverse_norm(square_t_[i]));
      if (w == nullptr) weights_[i] = 1;
    }
    Units<Real> units{inverse_s_, inverse_t_, w == nullptr ? weights_ : w};
    for (int64_t c = 0; c < layer_.channels; ++c) {
      along_positions(c, false, [&](const Real* s, const Real* t, Real*) {
        add_unit_sums(s, t, n_, phi, units, value_, dot_);
      });
    }
    Real slope_factor = p_.metric == Metric::cosine ? Real(0.5) : Real(1);
    double value = 0;
    for (int64_t i = 0; i < n_; ++i) {
      Real weight = units.counts[i];
      if (weight != 0) value += weight * unit_value(value_[i], inverse_s_[i], inverse_t_[i]);
      dots_[i] = static_cast<Real>(dot_[i]);
      factors_[i] = factor_ * weight * slope_factor * inverse_s_[i];
    }
    for (int64_t c = 0; c < layer_.channels && wants_gradient(); ++c) {
      along_positions(c, true, [&](const Real* s, const Real* t, Real* out) {
        unit_gradients(s, t, n_, phi, units, dots_, factors_, out);
      });
    }
    return value;
  }

  // Σ over channels of x² at every position of the sample.
  KD_TARGET void attention_map(const Feature& feature, int64_t channels, double* map) {
    const Strides& strides = feature.strides;
    for (int64_t o = 0; o < layer_.outer_size(); ++o, map += layer_.inner) {
      outer_ = o;
      const Real* w = weights();
      if (strides.channel == 1) {
        for (int64_t i = 0; i < n_; ++i) {
          map[i] = 0;
          if (w != nullptr && w[i] == 0) continue;
          for (int64_t start = 0; start < channels; start += kBlock) {
            int64_t n = channels - start < kBlock ? channels - start : kBlock;
            map[i] += squares(line_of(feature, offset(strides, i, start), 1, n, s_), n);
          }
        }
        continue;
      }
      for (int64_t i = 0; i < n_; ++i) map[i] = 0;
      for (int64_t c = 0; c < channels; ++c) {
        add_squares(line_of(feature, offset(strides, 0, c), strides.inner, n_, s_), w, map, n_);
      }
    }
  }

  KD_TARGET double attention() {
    n_ = layer_.inner;
    attention_map(layer_.student, layer_.channels, square_s_);
    attention_map(layer_.teacher, layer_.teacher_channels, square_t_);
    int64_t positions = layer_.positions();
    double norm_s = 0, norm_t = 0;
    for (int64_t i = 0; i < positions; ++i) {
      norm_s += square_s_[i] * square_s_[i];
      norm_t += square_t_[i] * square_t_[i];
    }
    double inverse_s = inverse_norm(norm_s), inverse_t = inverse_norm(norm_t);
    double value = 0, dot = 0;
    for (int64_t o = 0, i = 0; o < layer_.outer_size(); ++o) {
      outer_ = o;
      const Real* w = weights();
      for (int64_t k = 0; k < n_; ++k, ++i) {
        double weight = w == nullptr ? 1 : static_cast<double>(w[k]);
        double unit = square_s_[i] * inverse_s, d = unit - square_t_[i] * inverse_t;
        value += weight == 0 ? 0 : weight * d * d;
        value_[i] = weight == 0 ? 0 : 2 * weight * d;
        dot += value_[i] * unit;
        dots_[i] = static_cast<Real>(weight);
      }
    }
    if (!wants_gradient()) return value;
    for (int64_t i = 0; i < positions; ++i) {
      double slope = (value_[i] - square_s_[i] * inverse_s * dot) * inverse_s;
      factors_[i] = dots_[i] == 0 ? Real(0) : static_cast<Real>(2 * slope * factor_);
    }
    const Feature &s = layer_.student, &g = layer_.gradient;
    for (int64_t o = 0; o < layer_.outer_size(); ++o) {
      outer_ = o;
      const Real* map = factors_ + o * layer_.inner;
      for (int64_t c = 0; c < layer_.channels && !along_channels_; ++c) {
        int64_t at = offset(g.strides, 0, c);
        const Real* x = line_of(s, offset(s.strides, 0, c), s.strides.inner, n_, s_);
        Real* out = output_of(g, at, g.strides.inner, out_);
        times_map(x, map, out, n_);
        put_line(out, g, at, g.strides.inner, n_);
      }
      for (int64_t i = 0; i < n_ && along_channels_; ++i) {
        if (map[i] == 0) {
          clear_position(i);
          continue;
        }
        for (int64_t start = 0; start < layer_.channels; start += kBlock) {
          int64_t n = layer_.channels - start < kBlock ? layer_.channels - start : kBlock;
          int64_t at = offset(g.strides, i, start);
          Real* out = output_of(g, at, g.strides.channel, out_);
          scaled(line_of(s, offset(s.strides, i, start), 1, n, s_), map[i], out, n);
          put_line(out, g, at, g.strides.channel, n);
        }
      }
    }
    return value;
  }

  const Problem<Real>& p_;
  const Layer<Real>& layer_;
  const bool along_channels_;
  bool whole_;
  Real *s_, *t_, *out_;                                         // a line each
  Real *weights_, *inverse_s_, *inverse_t_, *dots_, *factors_;  // one a position
  double *square_s_, *square_t_, *value_, *dot_;                // one a position
  Real* variance_sums_ = nullptr;
  int64_t sample_ = 0, outer_ = 0, begin_ = 0, n_ = 0;
  Real factor_ = 0;
};

template <class Real>
void run(const Problem<Real>& problem, int64_t layer, int64_t begin, int64_t end) {
  const Layer<Real>& l = problem.layers[layer];
  PieceKernel<Real> kernel(problem, l);
  int64_t of_sample = l.pieces / l.samples;
  Matrix gradient{l.gradient.data, l.gradient.dtype, l.gradient.strides.sample, 0};
  FirstTouch fresh(gradient, l.samples, begin / of_sample, (end - 1) / of_sample + 1);
  for (int64_t piece = begin; piece < end; ++piece) {
    fresh.before(gradient.row(piece / of_sample + 1));
    kernel.run(piece);
  }
}

}  // namespace

extern const Kernels KD_KERNELS;
const Kernels KD_KERNELS = {run<float>, run<double>};

}  // namespace kd::features
