#include <limits>

#include "../cpu_level.h"
#include "problem.h"

namespace kd {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

const Kernels& kernels() { return KD_AT_CPU_LEVEL(kernels); }

int64_t find_bad_label(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t vocab) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= vocab)) return i;
  }
  return -1;
}

// The value where it lies in the range, else NaN: numbers were checked by the caller, tensors were
// not read until now.
template <class Real>
static Real accepted(Real value, bool inside) {
  return inside ? value : std::numeric_limits<Real>::quiet_NaN();
}

template <class Real>
static Real accepted_first(Divergence divergence, Real x) {
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
static Real accepted_second(Divergence divergence, Real x) {
  const Real inf = infinity<Real>();
  if (divergence == Divergence::ab) return accepted(x, x > 0 && x < inf);
  if (divergence == Divergence::dkd) return accepted(x, x >= 0 && x < inf);
  return x;
}

template <class Real>
void prepare(const Problem<Real>& p) {
  double kd_divisor = 0, ce_divisor = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    Real weight = p.token_weights ? p.token_weights[i] : Real(1);
    bool counted = weight != 0;
    bool labelled = counted && (p.labels == nullptr || p.labels[i] != p.ignore_index);
    bool kd = p.mask_kd ? labelled : counted, ce = p.labels != nullptr && labelled;
    p.masks[i] = (kd ? kKdCounts : 0) | (ce ? kCeCounts : 0);
    kd_divisor += kd ? weight : 0;
    ce_divisor += ce ? weight : 0;
  }
  bool divides = p.reduction == Reduction::batchmean || p.reduction == Reduction::mean;
  if (divides && p.has_normalizer) kd_divisor = ce_divisor = p.normalizer.at(0);
  if (!divides || kd_divisor == 0) kd_divisor = 1;
  if (!divides || ce_divisor == 0) ce_divisor = 1;
  double per_element = p.reduction == Reduction::mean ? static_cast<double>(p.vocab) : 1;

  for (int64_t i = 0; i < p.n; ++i) {
    Real weight = p.token_weights ? p.token_weights[i] : Real(1);
    Real ts = p.temperature.at(i), tt = p.teacher_temperature.at(i);
    ts = accepted(ts, ts > 0);
    tt = accepted(tt, tt > 0);
    Real kd = p.kd_weight.at(i), ce = p.ce_weight.at(i), z = p.z_loss_weight.at(i);
    bool kd_counts = p.masks[i] & kKdCounts, ce_counts = p.masks[i] & kCeCounts;
    double t2 = p.t_squared ? static_cast<double>(ts) * ts : 1;
    p.line(kKdScale, i) =
        kd_counts && kd != 0 ? static_cast<Real>(kd * t2 * weight / (kd_divisor * per_element)) : 0;
    p.line(kCeScale, i) = ce_counts && ce != 0 ? static_cast<Real>(ce * weight / ce_divisor) : 0;
    p.line(kZScale, i) = kd_counts && z != 0 ? static_cast<Real>(z * weight / kd_divisor) : 0;
    p.line(kTemperature, i) = ts;
    p.line(kTeacherTemperature, i) = tt;
    p.line(kFirst, i) = accepted_first(p.divergence, p.first.at(i));
    p.line(kSecond, i) = accepted_second(p.divergence, p.second.at(i));
  }
}

template void prepare(const Problem<float>&);
template void prepare(const Problem<double>&);

}  // namespace kd
