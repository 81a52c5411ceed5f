// The kernels of dist_loss for one instruction set (KD_TARGET). Included by cpu_<level>.cpp,
// nowhere else.
//
// rows: both rows' softmax, kept in a scratch, and their correlation. columns: every strip of
// columns from the top down, probabilities made once more, five sums a column in double, so that no
// number of threads changes one. backward: by rows again.
#pragma once

#include <cmath>
#include <initializer_list>

#include "../rows.h"
#include "../scratch.h"
#include "problem.h"

namespace kd::dist_loss {
namespace {

// out[i] = e^((x[i] − maximum)/τ − log z); c = log2(e)/τ.
KD_LOOP void probabilities(const Real* x, Real maximum, Real c, Real inverse_z, Real* out,
                           int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp2_scaled(x[i] - maximum, c) * inverse_z;
}

// Σp̃², Σq̃² and Σp̃·q̃ of deviations from the mean 1/V of a row.
KD_LOOP void add_moments(const Real* p, const Real* q, Real mean, double (&sums)[3], int64_t n) {
  double pp = 0, qq = 0, pq = 0;
#pragma omp simd reduction(+ : pp, qq, pq)
  for (int64_t i = 0; i < n; ++i) {
    double a = static_cast<double>(p[i] - mean), b = static_cast<double>(q[i] - mean);
    pp += a * a;
    qq += b * b;
    pq += a * b;
  }
  sums[0] += pp;
  sums[1] += qq;
  sums[2] += pq;
}

// Per column, deviations from the first row's probabilities: no digit is lost where a column hardly
// changes.
template <class Real>
struct Strip {
  Real p_first[kStrip], q_first[kStrip], p[kStrip], q[kStrip];
  double u[kStrip], v[kStrip], uu[kStrip], vv[kStrip], uv[kStrip];
};

KD_LOOP void add_row(Strip<Real>& strip, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    double a = static_cast<double>(strip.p[c] - strip.p_first[c]);
    double b = static_cast<double>(strip.q[c] - strip.q_first[c]);
    strip.u[c] += a;
    strip.v[c] += b;
    strip.uu[c] += a * a;
    strip.vv[c] += b * b;
    strip.uv[c] += a * b;
  }
}

template <class Real>
struct Correlation {
  double value = 0;
  Real by_teacher = 0, by_student = 0;
};

// Of two sets of n numbers with these means and sums of deviations. 0, without gradient, where one
// is constant: its standard deviation is within the rounding of exponentials.
template <class Real>
Correlation<Real> correlation(double pp, double qq, double pq, double p_mean, double q_mean,
                              int64_t n) {
  constexpr double rounding = 16 * static_cast<double>(std::numeric_limits<Real>::epsilon());
  double p_bound = rounding * p_mean, q_bound = rounding * q_mean;
  Correlation<Real> result;
  double count = static_cast<double>(n);
  if (pp <= p_bound * p_bound * count || qq <= q_bound * q_bound * count) return result;
  double both = std::sqrt(pp) * std::sqrt(qq);
  result.value = pq / both;
  result.by_teacher = static_cast<Real>(1 / both);
  result.by_student = static_cast<Real>(result.value / pp);
  return result;
}

// The derivative of the two losses by p; row terms are the same for all columns of a row.
template <class Real>
struct Slopes {
  Real row_by_teacher, row_by_student, row_mean, column_factor;
  const Real *p_mean, *q_mean, *by_teacher, *by_student;  // of the block's columns
};

template <class Real>
KD_INLINE Real slope(const Slopes<Real>& s, Real p, Real q, int64_t i) {
  Real row = s.row_by_student * (p - s.row_mean) - s.row_by_teacher * (q - s.row_mean);
  Real column = s.by_student[i] * (p - s.p_mean[i]) - s.by_teacher[i] * (q - s.q_mean[i]);
  return row + s.column_factor * column;
}

KD_LOOP double slope_sum(const Slopes<Real>& s, const Real* p, const Real* q, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(p[i] * slope(s, p[i], q[i], i));
  }
  return sum;
}

KD_LOOP void write_gradient(const Slopes<Real>& s, const Real* p, const Real* q, Real sum,
                            Real scale, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = p[i] * (slope(s, p[i], q[i], i) - sum) * scale;
}

template <class Real>
class RowKernel {
 public:
  explicit RowKernel(const Problem<Real>& problem) : p_(problem) {
    thread_local Scratch<Real> scratch;
    int64_t kept = (p_.vocab + 15) / 16 * 16;
    student_ = scratch.get(2 * kept + 2 * kBlock);
    teacher_ = student_ + kept;
    buffer_ = teacher_ + kept;
    out_ = buffer_ + kBlock;
  }

  void forward(int64_t i) {
    Real c = scale(i);
    softmax(p_.student, i, c, student_, student_maximum);
    softmax(p_.teacher, i, c, teacher_, teacher_maximum);
    double sums[3] = {}, mean = 1 / static_cast<double>(p_.vocab);
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      add_moments(student_ + start, teacher_ + start, static_cast<Real>(mean), sums, size(start));
    }
    auto r = correlation<Real>(sums[0], sums[1], sums[2], mean, mean, p_.vocab);
    p_.row_correlations[i] = r.value;
    number(row_by_teacher, i) = r.by_teacher;
    number(row_by_student, i) = r.by_student;
  }

  void backward(int64_t i) {
    Real c = scale(i);
    again(p_.student, i, c, student_, student_maximum);
    again(p_.teacher, i, c, teacher_, teacher_maximum);
    double rows = static_cast<double>(p_.n), vocab = static_cast<double>(p_.vocab);
    Real by_row = static_cast<Real>(static_cast<double>(p_.upstream[0]) / rows);
    Slopes<Real> s{by_row * number(row_by_teacher, i),
                   by_row * number(row_by_student, i),
                   static_cast<Real>(1 / vocab),
                   static_cast<Real>(static_cast<double>(p_.upstream[1]) / vocab),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};
    double sum = 0;
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      sum += slope_sum(at(s, start), student_ + start, teacher_ + start, size(start));
    }
    Real inverse = 1 / p_.temperature.at(i);
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      write_gradient(at(s, start), student_ + start, teacher_ + start, static_cast<Real>(sum),
                     inverse, out_, size(start));
      store(out_, p_.gradient.row(i), p_.gradient.dtype, start, size(start));
    }
  }

 private:
  int64_t size(int64_t start) const {
    return p_.vocab - start < kBlock ? p_.vocab - start : kBlock;
  }
  Real& number(RowNumber k, int64_t i) { return p_.rows[k * p_.n + i]; }
  Real scale(int64_t i) const {
    Real temperature = p_.temperature.at(i);
    return temperature > 0 ? log2_e<Real> / temperature : not_a_number<Real>();
  }
  Slopes<Real> at(Slopes<Real> s, int64_t start) const {
    const Real* columns = p_.columns + start;
    s.p_mean = columns + student_mean * p_.vocab;
    s.q_mean = columns + teacher_mean * p_.vocab;
    s.by_teacher = columns + column_by_teacher * p_.vocab;
    s.by_student = columns + column_by_student * p_.vocab;
    return s;
  }

  void softmax(const Matrix& matrix, int64_t i, Real c, Real* out, RowNumber first) {
    Row row = row_of(matrix, i, -1);
    Real largest = -infinity<Real>();
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      Real m = maximum(load(row, start, size(start), buffer_), size(start));
      largest = m > largest ? m : largest;
    }
    largest = anchored(largest);
    double z = 0;
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      const Real* x = load(row, start, size(start), buffer_);
      z += exponentials<Real>(x, largest, c, out + start, size(start), Ahead());
    }
    scaled(out, static_cast<Real>(1 / z), out, p_.vocab);
    number(first, i) = largest;
    number(static_cast<RowNumber>(first + 1), i) = static_cast<Real>(std::log(z));
  }

  // The same from what the forward kept.
  void again(const Matrix& matrix, int64_t i, Real c, Real* out, RowNumber first) {
    Row row = row_of(matrix, i, -1);
    Real largest = number(first, i);
    double z = std::exp(static_cast<double>(number(static_cast<RowNumber>(first + 1), i)));
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      probabilities(load(row, start, size(start), buffer_), largest, c, static_cast<Real>(1 / z),
                    out + start, size(start));
    }
  }

  const Problem<Real>& p_;
  Real *student_, *teacher_;  // a row each
  Real *buffer_, *out_;       // a block each
};

template <class Real>
void rows(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  for (int64_t i = begin; i < end; ++i) kernel.forward(i);
}

template <class Real>
void backward(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  for (int64_t i = begin; i < end; ++i) kernel.backward(i);
}

template <class Real>
void strip_probabilities(const Problem<Real>& p, const Matrix& matrix, RowNumber first, int64_t i,
                         int64_t start, int64_t n, Real* buffer, Real* out) {
  double z = std::exp(static_cast<double>(p.rows[(first + 1) * p.n + i]));
  Real c = log2_e<Real> / p.temperature.at(i);
  probabilities(load(row_of(matrix, i, -1), start, n, buffer), p.rows[first * p.n + i], c,
                static_cast<Real>(1 / z), out, n);
}

template <class Real>
void columns(const Problem<Real>& p, int64_t begin, int64_t end) {
  Strip<Real> strip;
  Real buffer[kStrip];
  for (int64_t start = begin * kStrip; start < p.vocab && start < end * kStrip; start += kStrip) {
    int64_t n = p.vocab - start < kStrip ? p.vocab - start : kStrip;
    for (double* sums : {strip.u, strip.v, strip.uu, strip.vv, strip.uv}) {
      for (int64_t c = 0; c < n; ++c) sums[c] = 0;
    }
    for (int64_t i = 0; i < p.n; ++i) {
      bool first = i == 0;
      strip_probabilities(p, p.student, student_maximum, i, start, n, buffer,
                          first ? strip.p_first : strip.p);
      strip_probabilities(p, p.teacher, teacher_maximum, i, start, n, buffer,
                          first ? strip.q_first : strip.q);
      if (!first) add_row(strip, n);
    }
    double count = static_cast<double>(p.n);
    for (int64_t c = 0; c < n; ++c) {
      double u = strip.u[c] / count, v = strip.v[c] / count;
      double p_mean = static_cast<double>(strip.p_first[c]) + u;
      double q_mean = static_cast<double>(strip.q_first[c]) + v;
      auto r = correlation<Real>(strip.uu[c] - u * strip.u[c], strip.vv[c] - v * strip.v[c],
                                 strip.uv[c] - u * strip.v[c], p_mean, q_mean, p.n);
      int64_t column = start + c;
      p.column_correlations[column] = r.value;
      p.columns[student_mean * p.vocab + column] = static_cast<Real>(p_mean);
      p.columns[teacher_mean * p.vocab + column] = static_cast<Real>(q_mean);
      p.columns[column_by_teacher * p.vocab + column] = r.by_teacher;
      p.columns[column_by_student * p.vocab + column] = r.by_student;
    }
  }
}

}  // namespace

const Kernels KD_KERNELS = {
    rows<float>, rows<double>, columns<float>, columns<double>, backward<float>, backward<double>,
};

}  // namespace kd::dist_loss
