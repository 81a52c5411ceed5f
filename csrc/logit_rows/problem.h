// What options of distillation_loss need of a row beside its loss: its mean and deviation, the sums
// that the temperatures' gradients are made of, the head's share of |p − q|, a row less a center.
// What each is: kdkernels/ops/distillation_loss/reference.py, under the same names. No torch
// header.
#pragma once

#include "../distillation_loss/problem.h"

namespace kd::logit_rows {

template <class Real>
struct Adaptive {
  int64_t vocab = 0;
  Matrix student, teacher;
  Parameter<Real> temperature, teacher_temperature;
  Real* weights = nullptr;  // (n)
};

template <class Real>
struct Centered {
  int64_t vocab = 0;
  Matrix grad, x;
  const Real *mean = nullptr, *factor = nullptr;  // (n)
};

// Rows begin ≤ i < end.
template <class Real>
struct Kernels {
  // (2, n): mean and deviation.
  void (*moments)(const Matrix& x, int64_t vocab, Real* out, int64_t n, int64_t begin, int64_t end);
  void (*add_centered)(const Centered<Real>&, int64_t begin, int64_t end);
  // (3, n), from the problem of a backward.
  void (*temperature_sums)(const Problem<Real>&, Real* out, int64_t begin, int64_t end);
  void (*adaptive_weights)(const Adaptive<Real>&, int64_t begin, int64_t end);
  // One row of x less the center.
  void (*subtract)(const Matrix& x, int64_t i, const Real* center, Real* out);
};

struct Table {
  Kernels<float> of_float;
  Kernels<double> of_double;
};

extern const Table kernels_baseline, kernels_avx2, kernels_avx512;

template <class Real>
const Kernels<Real>& kernels();  // for this machine's CPU level

}  // namespace kd::logit_rows
