// DKD's binary (label, rest) distributions, once a row.
#pragma once

#include <math.h>

#include "../divergences.h"

namespace kd {

// By the C names: those in std cannot be called on a device.
KD_INLINE float full_exp(float x) { return ::expf(x); }
KD_INLINE double full_exp(double x) { return ::exp(x); }
KD_INLINE float full_log1p(float x) { return ::log1pf(x); }
KD_INLINE double full_log1p(double x) { return ::log1p(x); }

template <class Real>
KD_INLINE Real log1p_exp(Real x) {  // log(1 + e^x)
  return x > 0 ? x + full_log1p(full_exp(-x)) : full_log1p(full_exp(x));
}

// From the log-odds of the label in both rows.
template <class Real>
struct Binary {
  Real student_label, teacher_label;  // probabilities
  Real kl, odds_gradient;             // ∂KL/∂(teacher's log-odds)
  KD_INLINE Binary(Real student_odds, Real teacher_odds) {
    Real a[2] = {-log1p_exp(-student_odds), -log1p_exp(student_odds)};
    Real b[2] = {-log1p_exp(-teacher_odds), -log1p_exp(teacher_odds)};
    student_label = full_exp(a[0]);
    teacher_label = full_exp(b[0]);
    kl = 0;
    for (int k = 0; k < 2; ++k) {
      kl += kl_term<Real>(full_exp(b[k]), full_exp(a[k]), log_ratio(a[k], b[k]));
    }
    odds_gradient = times<Real>(teacher_label * full_exp(b[1]), teacher_odds - student_odds);
  }
};

// Entropy of a whole row from the label's log-odds and the entropy of the rest.
template <class Real>
KD_INLINE Real whole_entropy(Real odds, Real rest_entropy) {
  Real log_label = -log1p_exp(-odds), log_rest = -log1p_exp(odds);
  Real label = full_exp(log_label), rest = full_exp(log_rest);
  return -times(label, log_label) - times(rest, log_rest) + times(rest, rest_entropy);
}

}  // namespace kd
