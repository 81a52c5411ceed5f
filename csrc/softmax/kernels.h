// The row kernels of softmax and log_softmax for one instruction set (KD_TARGET). Included by
// cpu_<level>.cpp, nowhere else.
//
// forward, per row: maximum and exponentials block by block, each relative to its block's maximum,
// kept in a scratch that stays in the second-level cache; then the output from them (log_softmax:
// from the input once more, nothing is kept). backward: from the output, one sum over the row, then
// the gradient; upstream and output are read twice, the second time from the cache.
#pragma once

#include <cmath>

#include "../rows.h"
#include "../scratch.h"
#include "problem.h"

namespace kd::softmax {
namespace {

// log2(e)/temperature in two pieces: as one number it would cost a probability of e^−80 a relative
// error of 5e-6.
template <class Real>
struct Scale {
  Real high, low;
  explicit Scale(Real temperature) {
    constexpr Real log2_e_low =
        sizeof(Real) == 4 ? Real(1.92596299e-8) : Real(2.0355273740931033e-17);
    high = log2_e<Real> / temperature;
    low = (std::fma(-high, temperature, log2_e<Real>) + log2_e_low) / temperature;
  }
  Real exponential(Real x) const { return exp2_scaled(x, high, low); }
};

// out[i] = e^((x[i] − anchor)/temperature), returning their sum.
KD_LOOP Real exponentials(const Real* x, Real anchor, Scale<Real> scale, Real* out, int64_t n) {
  Real high = scale.high, low = scale.low, sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = exp2_scaled(x[i] - anchor, high, low);
    sum += out[i];
  }
  return sum;
}

// Their sum alone, in double: the log-probability of a column near 1 is log(1 + the rest).
KD_LOOP double sum_of_exponentials(const Real* x, Real anchor, Scale<Real> scale, int64_t n) {
  Real high = scale.high, low = scale.low;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(exp2_scaled(x[i] - anchor, high, low));
  return sum;
}

KD_LOOP void log_probabilities(const Real* x, Real anchor, Real inverse_temperature, Real log_z,
                               Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - anchor) * inverse_temperature - log_z;
}

// The backward's sums are in double: in the gradient they cancel against single columns wherever a
// row is nearly one-hot.
KD_LOOP void add_sum(const Real* x, double& total, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  total += sum;
}

KD_LOOP void add_weighted_sum(const Real* p, const Real* g, double& total, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += times(static_cast<double>(p[i]), static_cast<double>(g[i]));
  }
  total += sum;
}

KD_LOOP void softmax_gradient(const Real* p, const Real* g, Real sum, Real scale, Real* out,
                              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = times(p[i], (g[i] - sum) * scale);
}

KD_LOOP void log_softmax_gradient(const Real* log_p, const Real* g, Real sum, Real scale, Real* out,
                                  int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (g[i] - exp(log_p[i]) * sum) * scale;
}

template <class Real>
class RowKernel {
 public:
  explicit RowKernel(const Problem<Real>& problem)
      : p_(problem), columns_(problem.x.columns), blocks_((columns_ + kBlock - 1) / kBlock) {
    thread_local Scratch<Real> scratch;
    int64_t kept = (columns_ + 15) / 16 * 16;
    thread_local Scratch<double> sums;
    sums_ = sums.get(blocks_);
    Real* memory = scratch.get(kept + 3 * kBlock + blocks_);
    es_ = memory;
    buffer_ = es_ + kept;
    other_buffer_ = buffer_ + kBlock;
    out_ = other_buffer_ + kBlock;
    maxima_ = out_ + kBlock;
  }

  void forward(int64_t i) {
    Real temperature = p_.temperature.at(i);
    if (!(temperature > 0)) temperature = std::numeric_limits<Real>::quiet_NaN();
    Scale<Real> scale(temperature);
    Row x = row_of(p_.x, i, -1);
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      const Real* block = load(x, start, n, buffer_);
      maxima_[k] = maximum(block, n);
      Real anchor = anchored(maxima_[k]);
      sums_[k] = p_.log ? sum_of_exponentials(block, anchor, scale, n)
                        : exponentials(block, anchor, scale, es_ + start, n);
    }
    Real anchor = anchored(maximum(maxima_, blocks_));
    double z = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      // A block of nothing but −inf has maximum −inf and factor 0.
      maxima_[k] = scale.exponential(maxima_[k] - anchor);
      z += sums_[k] * maxima_[k];
    }
    Real log_z = static_cast<Real>(std::log(z));
    char* output = p_.output.row(i);
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      if (p_.log) {
        log_probabilities(load(x, start, n, buffer_), anchor, 1 / temperature, log_z, out_, n);
      } else {
        scaled(es_ + start, static_cast<Real>(maxima_[k] / z), out_, n);
      }
      store(out_, output, p_.output.dtype, start, n);
    }
  }

  void backward(int64_t i) {
    Row upstream = row_of(p_.x, i, -1), output = row_of(p_.output, i, -1);
    char* gradient = p_.gradient.row(i);
    double sum = 0, sum_p = 0;
    for (int64_t start = 0; start < columns_; start += kBlock) {
      int64_t n = block_size(start);
      const Real* g = load(upstream, start, n, buffer_);
      if (p_.log) {
        add_sum(g, sum, n);
      } else {
        const Real* p = load(output, start, n, other_buffer_);
        add_weighted_sum(p, g, sum, n);
        add_sum(p, sum_p, n);
      }
    }
    if (!p_.log) sum /= sum_p;  // the rounded probabilities do not add up to 1
    auto write = p_.log ? log_softmax_gradient<Real> : softmax_gradient<Real>;
    for (int64_t start = 0; start < columns_; start += kBlock) {
      int64_t n = block_size(start);
      write(load(output, start, n, other_buffer_), load(upstream, start, n, buffer_),
            static_cast<Real>(sum), 1 / p_.temperature.at(i), out_, n);
      store(out_, gradient, p_.gradient.dtype, start, n);
    }
  }

 private:
  int64_t block_size(int64_t start) const {
    return columns_ - start < kBlock ? columns_ - start : kBlock;
  }

  const Problem<Real>& p_;
  const int64_t columns_, blocks_;
  Real* es_;                             // a row
  Real *buffer_, *other_buffer_, *out_;  // a block each
  Real* maxima_;                         // one a block
  double* sums_;
};

template <class Real>
void forward_rows(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  for (int64_t i = begin; i < end; ++i) kernel.forward(i);
}

template <class Real>
void backward_rows(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  for (int64_t i = begin; i < end; ++i) kernel.backward(i);
}

}  // namespace

const Kernels KD_KERNELS = {
    forward_rows<float>,
    forward_rows<double>,
    backward_rows<float>,
    backward_rows<double>,
};

}  // namespace kd::softmax
