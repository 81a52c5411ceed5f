// The row kernels of logit_rows for one instruction set (KD_TARGET). Included by cpu_<level>.cpp,
// nowhere else. Every sum is over blocks in order, in double.
#pragma once

#include <cmath>

#include "../distillation_loss/binary.h"
#include "../rows.h"
#include "../scratch.h"
#include "lines.h"
#include "problem.h"

namespace kd::logit_rows {
namespace {

// rows(start, n) for the blocks of a row.
template <class Each>
KD_TARGET inline void over_blocks(int64_t columns, Each each) {
  for (int64_t start = 0; start < columns; start += kBlock) {
    each(start, columns - start < kBlock ? columns - start : kBlock);
  }
}

// ---- mean and deviation ----

KD_LOOP double sum_of_squares(const Real* x, Real mean, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    double d = static_cast<double>(x[i]) - static_cast<double>(mean);
    sum += d * d;
  }
  return sum;
}

template <class Real>
void moments(const Matrix& x, int64_t vocab, Real* out, int64_t n, int64_t begin, int64_t end) {
  Real buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    Row row = row_of(x, i, -1);
    // From a column of the row, so that equal columns have deviation 0 in every dtype.
    Real origin = *load(row, 0, 1, buffer);
    double sum = 0, squares = 0;
    over_blocks(vocab, [&](int64_t start, int64_t size) {
      sum += total(load(row, start, size, buffer), origin, size);
    });
    Real mean = static_cast<Real>(origin + sum / static_cast<double>(vocab));
    over_blocks(vocab, [&](int64_t start, int64_t size) {
      squares += sum_of_squares(load(row, start, size, buffer), mean, size);
    });
    out[i] = mean;
    out[n + i] =
        static_cast<Real>(std::sqrt(squares / static_cast<double>(vocab > 1 ? vocab - 1 : 1)));
  }
}

KD_LOOP void plus_centered(const Real* grad, const Real* x, Real mean, Real factor, Real* out,
                           int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = grad[i] + factor * (x[i] - mean);
}

template <class Real>
void add_centered(const Centered<Real>& p, int64_t begin, int64_t end) {
  Real of_grad[kBlock], of_x[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    if (p.factor[i] == 0) continue;
    Row grad = row_of(p.grad, i, -1), x = row_of(p.x, i, -1);
    over_blocks(p.vocab, [&](int64_t start, int64_t n) {
      plus_centered(load(grad, start, n, of_grad), load(x, start, n, of_x), p.mean[i], p.factor[i],
                    of_grad, n);
      store(of_grad, p.grad.row(i), p.grad.dtype, start, n);
    });
  }
}

// ---- the temperatures' gradients ----

// A row as its lines describe it: log p = (x − anchor)·inverse_temperature − log_z.
template <class Real>
struct Side {
  Real anchor, inverse_temperature, log_z, sum;  // ΣG of the student, ΣH of the teacher
};

// What a block adds to the sums of both rows.
template <class D, class Real>
KD_TARGET __attribute__((noinline)) void add_products(const Real* s, const Real* t, int64_t n,
                                                      Side<Real> student, Side<Real> teacher,
                                                      Weights<Real> weights, Real factor,
                                                      Products<double>* sums) {
  double product_s = 0, product_t = 0, all_s = 0, all_t = 0, mean_s = 0, mean_t = 0;
#pragma omp simd reduction(+ : product_s, product_t, all_s, all_t, mean_s, mean_t)
  for (int64_t i = 0; i < n; ++i) {
    Real x = s[i] - student.anchor, y = t[i] - teacher.anchor;
    Real a = x * student.inverse_temperature - student.log_z;
    Real b = y * teacher.inverse_temperature - teacher.log_z;
    Real p = exp(a), q = exp(b);
    Real e = D::mixes ? expm1_nonpositive(-absolute(a - b)) : Real(0);
    Term<Real> term = D::term(a, b, p, q, e, weights);
    Real by_s = factor * term.g - p * student.sum, by_t = factor * term.h - q * teacher.sum;
    product_s += static_cast<double>(times(by_s, x));
    product_t += static_cast<double>(times(by_t, y));
    all_s += static_cast<double>(by_s);
    all_t += static_cast<double>(by_t);
    mean_s += static_cast<double>(times(p, x));
    mean_t += static_cast<double>(times(q, y));
  }
  sums[0].add(product_s, all_s, mean_s);
  sums[1].add(product_t, all_t, mean_t);
}

template <class Real>
auto products_of(Divergence divergence) -> decltype(&add_products<ForwardKL, Real>) {
  switch (divergence) {
    case Divergence::forward_kl:
    case Divergence::dkd:
      return add_products<ForwardKL, Real>;
    case Divergence::reverse_kl:
      return add_products<ReverseKL, Real>;
    case Divergence::jeffreys:
      return add_products<Jeffreys, Real>;
    case Divergence::jsd:
      return add_products<JSD, Real>;
    case Divergence::skew_forward_kl:
      return add_products<SkewForwardKL, Real>;
    case Divergence::skew_reverse_kl:
      return add_products<SkewReverseKL, Real>;
    case Divergence::alpha:
      return add_products<Alpha, Real>;
    case Divergence::tvd:
      return add_products<TotalVariation, Real>;
    case Divergence::renyi:
      return add_products<Renyi, Real>;
    case Divergence::ab:
      return add_products<AlphaBeta, Real>;
  }
  return nullptr;
}

template <class Real>
void temperature_sums(const Problem<Real>& p, Real* out, int64_t begin, int64_t end) {
  Real buffer_s[kBlock], buffer_t[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    Products<double> sums[2];
    Real kd = 0;
    if (p.line(kKdScale, i) != 0) {
      LineSums<Real> row = line_sums(p, i);
      Row student = row_of(p.student, i, row.label), teacher = row_of(p.teacher, i, row.label);
      kd = row.kd;
      Side<Real> of_s{p.line(kStudentMax, i), 1 / p.line(kTemperature, i), p.line(kStudentLogZ, i),
                      row.sum_g};
      Side<Real> of_t{p.line(kTeacherMax, i), 1 / p.line(kTeacherTemperature, i),
                      p.line(kTeacherLogZ, i), row.sum_h};
      if (row.label >= 0) {
        Row whole_s = row_of(p.student, i, -1), whole_t = row_of(p.teacher, i, -1);
        Real x = *load(whole_s, row.label, 1, buffer_s) - of_s.anchor;
        Real y = *load(whole_t, row.label, 1, buffer_t) - of_t.anchor;
        Binary<Real> binary(x * of_s.inverse_temperature - of_s.log_z,
                            y * of_t.inverse_temperature - of_t.log_z);
        kd = times(row.weights.first, binary.kl) + times(row.weights.second, row.kd);
        Real by_label = row.weights.first * binary.odds_gradient;
        of_t.sum = row.weights.second * row.kd + by_label;
        sums[0].add(times(row.sum_g, x), row.sum_g, 0);
        sums[1].add(times(by_label, y), by_label, 0);
      }
      auto products = products_of<Real>(row.effective);
      over_blocks(p.vocab, [&](int64_t start, int64_t n) {
        products(load(student, start, n, buffer_s), load(teacher, start, n, buffer_t), n, of_s,
                 of_t, row.weights, row.factor, sums);
      });
    }
    out[i] = static_cast<Real>(sums[0].centred());
    out[p.n + i] = static_cast<Real>(sums[1].centred());
    out[2 * p.n + i] = kd;
  }
}

// ---- head and tail ----

// Floats as integers in the same order. Those that were 16-bit numbers have zeros in their low
// bits: `drop` of them are left out, and there are so many halvings less to do.
template <class Real>
struct Order {
  using Bits = typename Format<Real>::Bits;
  using Signed = std::make_signed_t<Bits>;
  int drop;
  Signed key(Real x) const {
    Signed bits = bits_as<Signed>(x);
    return (bits < 0 ? bits ^ static_cast<Signed>(Format<Real>::magnitude) : bits) >> drop;
  }
  Real value(Signed key) const {
    Bits low = (Bits(1) << drop) - 1;
    Signed bits = static_cast<Signed>(static_cast<Bits>(key) << drop);
    if (key < 0)
      bits = static_cast<Signed>(bits | low) ^ static_cast<Signed>(Format<Real>::magnitude);
    return bits_as<Real>(bits);
  }
};

template <class Real>
int low_zeros(Dtype dtype) {
  int of_float = dtype == Dtype::bfloat16 ? 16 : dtype == Dtype::float16 ? 13 : 0;
  if (sizeof(Real) == 4) return of_float;
  return dtype == Dtype::float64 ? 0 : 29 + of_float;
}

// Σ q where t ≥ threshold.
KD_LOOP Real mass_from(const Real* t, const Real* q, Real threshold, int64_t n) {
  Real sum = 0, sum1 = 0;
  int64_t half = n / (2 * kLanes) * kLanes;
  const Real *t1 = t + half, *q1 = q + half;
#pragma omp simd reduction(+ : sum, sum1)
  for (int64_t i = 0; i < half; ++i) {
    sum += t[i] >= threshold ? q[i] : Real(0);
    sum1 += t1[i] >= threshold ? q1[i] : Real(0);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 2 * half; i < n; ++i) sum += t[i] >= threshold ? q[i] : Real(0);
  return sum + sum1;
}

KD_LOOP Real minimum(const Real* x, int64_t n) {
  Real m = infinity<Real>();
#pragma omp simd reduction(min : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] < m ? x[i] : m;
  return m;
}

// Of columns above the threshold: Σ q and Σ |p − q|; and of all columns Σ |p − q|.
KD_LOOP void gaps_above(const Real* t, const Real* p, const Real* q, Real threshold, int64_t n,
                        double* mass, double* head, double* all) {
  double of_mass = 0, of_head = 0, of_all = 0;
#pragma omp simd reduction(+ : of_mass, of_head, of_all)
  for (int64_t i = 0; i < n; ++i) {
    Real gap = absolute(p[i] - q[i]);
    bool above = t[i] > threshold;
    of_mass += static_cast<double>(above ? q[i] : Real(0));
    of_head += static_cast<double>(above ? gap : Real(0));
    of_all += static_cast<double>(gap);
  }
  *mass = of_mass;
  *head = of_head;
  *all = of_all;
}

// A row's softmax, and its logits where they are no Reals.
template <class Real>
const Real* softmax_of(const Row& row, int64_t vocab, Real temperature, Real* logits, Real* out) {
  const Real* x = load(row, 0, vocab, logits);
  Real tau = temperature > 0 ? temperature : not_a_number<Real>();
  double z = exponentials(x, anchored(maximum(x, vocab)), log2_e<Real> / tau, out, vocab, Ahead{});
  scaled(out, static_cast<Real>(1 / z), out, vocab);
  return x;
}

template <class Real>
Real head_share(const Real* t, const Real* p, const Real* q, int64_t vocab, Dtype dtype) {
  Order<Real> order{low_zeros<Real>(dtype)};
  // The largest threshold from which on there is more than ½. Sums of floats in one order only grow
  // with their terms, so halving finds it.
  auto low = order.key(minimum(t, vocab)), high = order.key(maximum(t, vocab));
  high += 1;
  while (low + 1 < high) {
    auto middle = (low & high) + ((low ^ high) >> 1);  // their mean, without an overflow
    (mass_from(t, q, order.value(middle), vocab) > Real(0.5) ? low : high) = middle;
  }
  Real threshold = order.value(low);
  double mass, head, all;
  gaps_above(t, p, q, threshold, vocab, &mass, &head, &all);
  // Of equal columns at the threshold those that still fit, in order; the first column of all in
  // any case.
  bool empty = mass == 0;
  for (int64_t i = 0; i < vocab && (empty || mass <= 0.5); ++i) {
    if (t[i] != threshold) continue;
    mass += static_cast<double>(q[i]);
    if (empty || mass <= 0.5) head += static_cast<double>(absolute(p[i] - q[i]));
    empty = false;
  }
  return static_cast<Real>(all == 0 ? 0.5 : head / all);
}

template <class Real>
void adaptive_weights(const Adaptive<Real>& p, int64_t begin, int64_t end) {
  thread_local Scratch<Real> scratch;
  int64_t padded = (p.vocab + 15) / 16 * 16 + 16;
  Real* own = scratch.get(4 * padded);
  Real *other = own + padded, *logits_s = other + padded, *logits_t = logits_s + padded;
  for (int64_t i = begin; i < end; ++i) {
    softmax_of(row_of(p.student, i, -1), p.vocab, p.temperature.at(i), logits_s, own);
    const Real* t =
        softmax_of(row_of(p.teacher, i, -1), p.vocab, p.teacher_temperature.at(i), logits_t, other);
    p.weights[i] = head_share(t, own, other, p.vocab, p.teacher.dtype);
  }
}

// ---- a row less a center ----

KD_LOOP void difference(const Real* x, const Real* y, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] - y[i];
}

template <class Real>
void subtract(const Matrix& x, int64_t i, const Real* center, Real* out) {
  Row row = row_of(x, i, -1);
  over_blocks(x.columns, [&](int64_t start, int64_t n) {
    difference(load(row, start, n, out + start), center + start, out + start, n);
  });
}

template <class Real>
constexpr Kernels<Real> table() {
  return {moments<Real>, add_centered<Real>, temperature_sums<Real>, adaptive_weights<Real>,
          subtract<Real>};
}

}  // namespace

extern const Table KD_KERNELS;
const Table KD_KERNELS = {table<float>(), table<double>()};

}  // namespace kd::logit_rows
