// One struct per divergence: term(a, b, p, q, e, w) -> {φ, G, H}, with a = log p (student), b = log
// q (teacher), G = p·∂φ/∂p, H = q·∂φ/∂q. (H = kφ − G by Euler's theorem; written out, because the
// difference cancels where p ≈ q.) The formulas, their sources and why φ is written in its Bregman
// form: kdkernels/divergences.py, which these must agree with.
//
// Rows whose parameter sits at an end (jsd β = 0, alpha = 1, …) never get here: `select` below
// sends them to a KL.
#pragma once

#include "elementary.h"

namespace kd {

enum class Divergence {
  forward_kl,
  reverse_kl,
  jeffreys,
  jsd,
  skew_forward_kl,
  skew_reverse_kl,
  alpha,
  tvd,
  renyi,
  ab,
  dkd,
};

constexpr const char* divergence_names[] = {
    "forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_forward_kl", "skew_reverse_kl", "alpha",
    "tvd",        "renyi",      "ab",       "dkd",
};

template <class Real>
struct Term {
  Real phi, g, h;
};

// The parameters of a row, and what the terms derive from them.
template <class Real>
struct Weights {
  Real first, second;
  Real log_b;  // Rényi: log Σ q^r p^(1−r)
};

// d; where both are −inf it is 0 here and NaN in a − b.
template <class Real>
KD_INLINE Real log_ratio(Real a, Real b) {
  return a == b ? Real(0) : a - b;
}

// `times` for a probability: one masked multiplication. (A NaN weight is lost here, never in the
// row: its log-sum-exp is NaN.)
template <class Real>
KD_INLINE Real weighted(Real probability, Real x) {
  return probability > 0 ? probability * x : Real(0);
}

// Bregman form of KL(weight‖other), d = log(other/weight), NaN allowed where both are 0.
template <class Real>
KD_INLINE Real kl_term(Real weight, Real other, Real d) {
  Real product = weighted(weight, d);
  Real far = (other - weight) - product, near = product * expm1_minus_over_x(d);
  return absolute(d) < Real(0.25) ? near : far;
}

// Traits: whether ΣG = 0 is known, so that the gradient needs no sum over the row; whether terms
// take expm1(−|a − b|) in e; whether they read a and b in a − b alone, so that term(d, 0, …) is the
// same; whether p or q is part of a difference.
struct Plain {
  static constexpr bool sum_g_is_zero = false, mixes = false, of_difference = false,
                        subtracts = true;
};
struct OfDifference : Plain {
  static constexpr bool of_difference = true;
};
struct Mixes : OfDifference {
  static constexpr bool mixes = true;
};

// Not OfDifference, though it is one: a row of differences more gains forward KL nothing (1.49
// times torch.add's time in place instead of 1.43, 512×32000 float32), where it takes 11 % from
// JSD.
struct ForwardKL : Plain {
  static constexpr bool sum_g_is_zero = true;  // Σp − Σq
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real, const Weights<Real>&) {
    Real d = a - b;
    return {kl_term(q, p, d), p - q, -weighted(q, d)};
  }
};

struct ReverseKL : OfDifference {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real, const Weights<Real>&) {
    Real d = a - b;
    return {kl_term(p, q, -d), weighted(p, d), q - p};
  }
};

struct Jeffreys : OfDifference {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real e, const Weights<Real>& w) {
    auto forward = ForwardKL::term(a, b, p, q, e, w), reverse = ReverseKL::term(a, b, p, q, e, w);
    Real weight = w.first, rest = 1 - weight;
    return {weight * forward.phi + rest * reverse.phi, weight * forward.g + rest * reverse.g,
            weight * forward.h + rest * reverse.h};
  }
};

// What m = βq + (1 − β)p makes of d = log(p/q): logarithms and ratios from d alone, without 0/0 or
// cancellation at small d. e = expm1(−|d|) is handed in; moderate promises near_half(beta).
template <class Real, bool moderate = false>
struct Mixture {
  Real log_p_m, log_q_m;    // log(p/m), log(q/m)
  Real excess_p, excess_q;  // p/m − 1, q/m − 1
  KD_INLINE Mixture(Real d, Real e, Real beta) {
    Real y = (d >= 0 ? beta : 1 - beta) * e;  // m/larger − 1
    Real log_larger = -(moderate ? log1p_moderate(y) : log1p_nonpositive(y)),
         log_smaller = log_larger - absolute(d);
    Real inverse = quotient<Real>(1, 1 + y), larger = -y * inverse, smaller = (e - y) * inverse;
    log_p_m = d >= 0 ? log_larger : log_smaller;
    log_q_m = d >= 0 ? log_smaller : log_larger;
    excess_p = d >= 0 ? larger : smaller;
    excess_q = d >= 0 ? smaller : larger;
  }
};

// Whether 1 − max(β, 1 − β) ≥ √½/2, so that m is never much smaller than the larger of p and q.
template <class Real>
KD_INLINE bool near_half(Real beta) {
  return beta >= Real(0.36) && beta <= Real(0.64);
}

template <bool moderate>
struct JSDWith : Mixes {
  static constexpr bool subtracts = false;
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real e, const Weights<Real>& w) {
    Real beta = w.first, rest = 1 - beta;
    Mixture<Real, moderate> m(a - b, e, beta);
    Real scale = w.second > 0 ? quotient<Real>(1, beta * rest) : Real(1);
    Real g = weighted(p, m.log_p_m) * (rest * scale);
    Real h = weighted(q, m.log_q_m) * (beta * scale);
    return {g + h, g, h};
  }
};
struct JSD : JSDWith<false> {};

// In the skew divergences λ = 1 leaves log(q/q) = 0, which the mixture could only round to.
struct SkewForwardKL : Mixes {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real e, const Weights<Real>& w) {
    Real lam = w.first, rest = 1 - lam;
    Mixture<Real> m(a - b, e, lam);
    Real log_q_m = rest == 0 ? Real(0) : m.log_q_m, excess = rest == 0 ? Real(0) : m.excess_q;
    return {kl_term(q, lam * q + rest * p, -log_q_m), -rest * weighted(p, excess),
            weighted(q, log_q_m) - lam * weighted(q, excess)};
  }
};

struct SkewReverseKL : Mixes {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real e, const Weights<Real>& w) {
    Real lam = w.first, rest = 1 - lam;
    Mixture<Real> m(a - b, e, rest);
    Real log_p_m = rest == 0 ? Real(0) : m.log_p_m, excess = rest == 0 ? Real(0) : m.excess_p;
    return {kl_term(p, rest * q + lam * p, -log_p_m),
            weighted(p, log_p_m) - lam * weighted(p, excess), -rest * weighted(q, excess)};
  }
};

// order·b + (1 − order)·a, −inf where both are.
template <class Real>
KD_INLINE Real geometric(Real a, Real b, Real order) {
  return a == b ? a : order * b + (1 - order) * a;
}

struct Alpha : Plain {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real, const Weights<Real>& w) {
    Real alpha = w.first, d = log_ratio(a, b), pi = exp(geometric(a, b, alpha));
    bool around_q = alpha > Real(0.5);
    Real weight = around_q ? q : p, other = around_q ? p : q;
    Real x = around_q ? d : -d, kappa = around_q ? 1 - alpha : alpha;
    Real near = weight * (expm1_minus(kappa * x) - kappa * expm1_minus(x));
    Real far = pi - (1 - kappa) * weight - kappa * other;
    bool small = absolute(d) < Real(0.25) && absolute(kappa * d) < Real(0.25);
    return {quotient(small ? near : far, alpha * (alpha - 1)),
            quotient(small ? -p * expm1(-alpha * d) : p - pi, alpha),
            quotient(small ? q * expm1((1 - alpha) * d) : pi - q, alpha - 1)};
  }
};

struct TotalVariation : Plain {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real, const Weights<Real>&) {
    Real half = Real(0.5);
    Real sign = a > b ? half : (a < b ? -half : (a == b ? Real(0) : a - b));
    return {sign * (p - q), p * sign, -q * sign};
  }
};

// φ is alpha's; the row turns its sum and log B into D = log B/(r − 1) and ΣG = −1.
struct Renyi : Plain {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real p, Real q, Real e, const Weights<Real>& w) {
    Real tilted = exp(geometric(a, b, w.first) - w.log_b);
    return {Alpha::term(a, b, p, q, e, w).phi, -tilted, quotient(tilted * w.first, w.first - 1)};
  }
};

struct AlphaBeta : Plain {
  template <class Real>
  static KD_INLINE Term<Real> term(Real a, Real b, Real, Real, Real, const Weights<Real>& w) {
    Real alpha = w.first, beta = w.second, k = alpha + beta, d = log_ratio(a, b);
    Real q_k = exp(k * b), p_k = exp(k * a), mixed = exp(alpha * b + beta * a);
    Real near = quotient(q_k, alpha) *
                (quotient(expm1_minus(k * d), k) - quotient(expm1_minus(beta * d), beta));
    Real far = quotient(beta * p_k + alpha * q_k - k * mixed, k * alpha * beta);
    bool small = absolute(k * d) < Real(0.25);
    return {small ? near : far, quotient(small ? -p_k * expm1(-alpha * d) : p_k - mixed, alpha),
            quotient(small ? -q_k * expm1(beta * d) : q_k - mixed, beta)};
  }
};

// The divergence that a row's parameters really ask for: the KLs at the ends of the others.
template <class Real>
KD_INLINE Divergence select(Divergence divergence, Real first) {
  switch (divergence) {
    case Divergence::jeffreys:
      if (first == 0) return Divergence::reverse_kl;
      return first == 1 ? Divergence::forward_kl : divergence;
    case Divergence::jsd:
      if (first == 1) return Divergence::reverse_kl;
      return first == 0 ? Divergence::forward_kl : divergence;
    case Divergence::skew_forward_kl:
      return first == 0 ? Divergence::forward_kl : divergence;
    case Divergence::skew_reverse_kl:
      return first == 0 ? Divergence::reverse_kl : divergence;
    case Divergence::alpha:
      if (first == 0) return Divergence::reverse_kl;
      return first == 1 ? Divergence::forward_kl : divergence;
    case Divergence::renyi:
      return first == 1 ? Divergence::forward_kl : divergence;
    case Divergence::dkd:
      return Divergence::forward_kl;
    default:
      return divergence;
  }
}

}  // namespace kd
