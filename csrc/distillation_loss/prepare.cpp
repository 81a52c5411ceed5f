#include "../cpu_level.h"
#include "row_options.h"

namespace kd {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

const Kernels& kernels() { return KD_AT_CPU_LEVEL(kernels); }

int64_t find_bad_label(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t vocab) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= vocab)) return i;
  }
  return -1;
}

template <class Real>
void prepare(const Problem<Real>& p) {
  double kd_weights = 0, ce_weights = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    int mask = mask_of(p, i);
    p.masks[i] = static_cast<uint8_t>(mask);
    kd_weights += mask & kKdCounts ? weight_of(p, i) : Real(0);
    ce_weights += mask & kCeCounts ? weight_of(p, i) : Real(0);
  }
  Divisors divisors = divisors_of(p, kd_weights, ce_weights);
  for (int64_t i = 0; i < p.n; ++i) {
    RowOptions<Real> o = row_options(p, i, p.masks[i], divisors);
    p.line(kKdScale, i) = o.kd_scale;
    p.line(kCeScale, i) = o.ce_scale;
    p.line(kZScale, i) = o.z_scale;
    p.line(kTemperature, i) = o.temperature;
    p.line(kTeacherTemperature, i) = o.teacher_temperature;
    p.line(kFirst, i) = o.first;
    p.line(kSecond, i) = o.second;
  }
}

template void prepare(const Problem<float>&);
template void prepare(const Problem<double>&);

}  // namespace kd
