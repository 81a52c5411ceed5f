// What a row's options come to: scales with weights, masks and normalisers in them, checked
// temperatures and parameters. For the CPU (prepare.cpp) and the device (cuda.cu).
#pragma once

#include "problem.h"

namespace kd {

// The value where it lies in the range, else NaN: numbers were checked by the caller, tensors were
// not read until now.
template <class Real>
KD_INLINE Real accepted(Real value, bool inside) {
  return inside ? value : not_a_number<Real>();
}

template <class Real>
KD_INLINE Real accepted_first(Divergence divergence, Real x) {
  const Real inf = infinity<Real>();
  switch (divergence) {
    case Divergence::jeffreys:
    case Divergence::jsd:
    case Divergence::skew_forward_kl:
    case Divergence::skew_reverse_kl:
      return accepted(x, x >= 0 && x <= 1);
    case Divergence::alpha:
      return accepted(x, x > -inf && x < inf);
    case Divergence::renyi:
    case Divergence::ab:
      return accepted(x, x > 0 && x < inf);
    case Divergence::dkd:
      return accepted(x, x >= 0 && x < inf);
    default:
      return x;
  }
}

template <class Real>
KD_INLINE Real accepted_second(Divergence divergence, Real x) {
  const Real inf = infinity<Real>();
  if (divergence == Divergence::ab) return accepted(x, x > 0 && x < inf);
  if (divergence == Divergence::dkd) return accepted(x, x >= 0 && x < inf);
  return x;
}

template <class Real>
KD_INLINE Real weight_of(const Problem<Real>& p, int64_t i) {
  return p.token_weights ? p.token_weights[i] : Real(1);
}

// The terms that row i counts in: kKdCounts, kCeCounts.
template <class Real>
KD_INLINE int mask_of(const Problem<Real>& p, int64_t i) {
  bool counted = weight_of(p, i) != 0;
  bool labelled = counted && (p.labels == nullptr || p.labels[i] != p.ignore_index);
  bool kd = p.mask_kd ? labelled : counted, ce = p.labels != nullptr && labelled;
  return (kd ? kKdCounts : 0) | (ce ? kCeCounts : 0);
}

template <class Real>
KD_INLINE bool divides(const Problem<Real>& p) {
  return p.reduction == Reduction::batchmean || p.reduction == Reduction::mean;
}

// What the terms are divided by, from the sums of the weights of the rows that count in each.
struct Divisors {
  double kd, ce;
};

template <class Real>
KD_INLINE Divisors divisors_of(const Problem<Real>& p, double kd_weights, double ce_weights) {
  Divisors d{kd_weights, ce_weights};
  if (divides(p) && p.has_normalizer) d.kd = d.ce = p.normalizer.at(0);
  if (!divides(p) || d.kd == 0) d.kd = 1;
  if (!divides(p) || d.ce == 0) d.ce = 1;
  return d;
}

template <class Real>
struct RowOptions {
  Real kd_scale, ce_scale, z_scale, temperature, teacher_temperature, first, second;
};

template <class Real>
KD_INLINE RowOptions<Real> row_options(const Problem<Real>& p, int64_t i, int mask,
                                       Divisors divisors) {
  double per_element = p.reduction == Reduction::mean ? static_cast<double>(p.vocab) : 1;
  Real weight = weight_of(p, i), ts = p.temperature.at(i), tt = p.teacher_temperature.at(i);
  ts = accepted(ts, ts > 0);
  tt = accepted(tt, tt > 0);
  Real kd = p.kd_weight.at(i), ce = p.ce_weight.at(i), z = p.z_loss_weight.at(i);
  bool kd_counts = mask & kKdCounts, ce_counts = mask & kCeCounts;
  double t2 = p.t_squared ? static_cast<double>(ts) * ts : 1;
  RowOptions<Real> o;
  o.kd_scale = kd_counts && kd != 0
                   ? static_cast<Real>(kd * t2 * weight / (divisors.kd * per_element))
                   : Real(0);
  o.ce_scale = ce_counts && ce != 0 ? static_cast<Real>(ce * weight / divisors.ce) : Real(0);
  o.z_scale = kd_counts && z != 0 ? static_cast<Real>(z * weight / divisors.kd) : Real(0);
  o.temperature = ts;
  o.teacher_temperature = tt;
  o.first = accepted_first(p.divergence, p.first.at(i));
  o.second = accepted_second(p.divergence, p.second.at(i));
  return o;
}

}  // namespace kd
