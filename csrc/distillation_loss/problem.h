// One call of distillation_loss as plain pointers and sizes, and the kernels that serve it. No
// torch header.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../divergences.h"

namespace kd {

enum class Reduction { batchmean, sum, none, mean };

// The lines of `rows`: kdkernels/ops/distillation_loss/reference.py explains each, under the same
// names.
enum Line {
  kStudentMax,
  kStudentLogZ,
  kTeacherMax,
  kTeacherLogZ,
  kDivergence,
  kSumG,
  kUnitLogZ,
  kKdScale,
  kCeScale,
  kZScale,
  kTemperature,
  kTeacherTemperature,
  kFirst,
  kSecond,
  kLines,
  // only with return_stats
  kKd = kLines,
  kCe,
  kStudentEntropy,
  kTeacherEntropy,
  kLabelLogProb,
  kAgreement,
  kLinesWithStats,
};

enum Mask : uint8_t { kKdCounts = 1, kCeCounts = 2 };

template <class Real>
struct Problem {
  int64_t n = 0, vocab = 0;
  Matrix student, teacher, student_grad, teacher_grad;  // gradients: no data where not wanted
  const int64_t* labels = nullptr;
  Divergence divergence = Divergence::forward_kl;
  double label_smoothing = 0;
  Real* rows = nullptr;  // (lines, n)

  // forward only
  const Real* token_weights = nullptr;
  Parameter<Real> first, second, temperature, teacher_temperature;
  Parameter<Real> kd_weight, ce_weight, z_loss_weight, normalizer;
  bool has_normalizer = false, t_squared = true, mask_kd = true, return_stats = false;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::batchmean;
  uint8_t* masks = nullptr;  // (n)
  Real* totals = nullptr;    // (n) each row's part of the loss

  // backward only: the upstream factor, one (stride 0) or one a row
  const Real* upstream = nullptr;
  int64_t upstream_stride = 0;

  KD_INLINE Real& line(int which, int64_t row) const { return rows[which * n + row]; }
};

// The first row whose label is neither a column nor ignore_index, or −1.
int64_t find_bad_label(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t vocab);

// Fills the lines kKdScale … kSecond and the masks: everything about a row that does not need its
// logits.
template <class Real>
void prepare(const Problem<Real>& problem);

// Rows begin ≤ i < end. `forward` fills the other lines and totals, and the gradients that have
// data.
struct Kernels {
  void (*forward_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*forward_double)(const Problem<double>&, int64_t begin, int64_t end);
  void (*backward_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*backward_double)(const Problem<double>&, int64_t begin, int64_t end);
  void (*scale_float)(const Matrix& from, const Matrix& to, const float* factor, int64_t stride,
                      int64_t begin, int64_t end);
  void (*scale_double)(const Matrix& from, const Matrix& to, const double* factor, int64_t stride,
                       int64_t begin, int64_t end);
};

const Kernels& kernels();  // for this machine's CPU level

}  // namespace kd
