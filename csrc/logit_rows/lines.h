// What a row's lines say of its divergence, for host and device.
#pragma once

#include "../distillation_loss/problem.h"

namespace kd::logit_rows {

// Σ x·d, Σ d and Σ p·x of a row's derivatives d and probabilities p. As Σ d = 0, the first is the
// same with any number subtracted from x: the mean, which cancels what a rounded log-sum-exp does
// to every p.
template <class Sum>
struct Products {
  Sum product = 0, all = 0, mean = 0;
  KD_INLINE void add(Sum x_d, Sum d, Sum p_x) {
    product += x_d;
    all += d;
    mean += p_x;
  }
  KD_INLINE Sum centred() const { return product - times(all, mean); }
};

template <class Real>
struct LineSums {
  Divergence effective;
  Weights<Real> weights;
  Real kd, sum_g, sum_h;  // kd, sum_h: of DKD without what the label's binary divergence adds
  Real factor;            // of G and H
  int64_t label;          // the column that is left out, or −1
};

template <class Real>
KD_INLINE LineSums<Real> line_sums(const Problem<Real>& p, int64_t i) {
  LineSums<Real> row;
  row.weights = {p.line(kFirst, i), p.line(kSecond, i), Real(0)};
  Real first = row.weights.first, second = row.weights.second;
  row.effective = select(p.divergence, first);
  row.label = p.divergence == Divergence::dkd ? p.labels[i] : -1;
  row.factor = row.label >= 0 ? second : Real(1);
  row.kd = p.line(kDivergence, i);
  row.sum_g = p.line(kSumG, i);
  row.sum_h = row.kd - row.sum_g;
  if (row.effective == Divergence::reverse_kl) {
    row.sum_h = 0;  // Σq − Σp
  } else if (row.effective == Divergence::ab) {
    row.sum_h = (first + second) * row.kd - row.sum_g;
  } else if (row.effective == Divergence::renyi) {
    row.weights.log_b = row.sum_g;
    row.sum_g = -1;
    row.sum_h = first / (first - 1);
  }
  return row;
}

}  // namespace kd::logit_rows
