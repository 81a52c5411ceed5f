// One call of an RKD loss as plain pointers and sizes, and the kernels that serve it. No torch
// header. The schemas and what every argument means are in kdkernels/ops/rkd_loss/__init__.py.
#pragma once

#include <cstdint>

namespace kd::rkd_loss {

// Rows handled together: they share what is read of all the others.
constexpr int64_t kRows = 16;

// N points as rows, strides in elements, columns contiguous.
template <class Real>
struct Points {
  const Real* data = nullptr;
  int64_t stride = 0, columns = 0;
  const Real* row(int64_t i) const { return data + i * stride; }
};

template <class Real>
struct Distances {
  Points<Real> student, teacher;
  int64_t n = 0;
  // N×N distances, or nullptr: every sweep then computes its rows anew.
  Real *student_distances = nullptr, *teacher_distances = nullptr;
  double* sums = nullptr;    // (4, N): of both rows' distances; of ψ; of ψ′·student distance
  double means[2] = {0, 0};  // distances over the ordered pairs, student and teacher
  double common = 0;         // what the student's mean subtracts from every ψ′/mean
  Real* gradient = nullptr;  // (N, student columns)
};

template <class Real>
struct Angles {
  Points<Real> student, teacher;
  int64_t n = 0;
  // (N, N): squared distances, and 1/distance or 0.
  double *student_squares = nullptr, *teacher_squares = nullptr;
  Real *student_inverses = nullptr, *teacher_inverses = nullptr;
  double* sums = nullptr;  // (N): of ψ
  // (N, N): derivatives by a squared distance, as an arm of the angle and as the side across it.
  Real *arms = nullptr, *across = nullptr;
  Real* gradient = nullptr;  // (N, student columns)
};

// Blocks of kRows rows begin ≤ b < end; in *_pairs the b-th from either end, so that all cost the
// same.
struct Kernels {
  void (*distance_pairs_float)(const Distances<float>&, int64_t begin, int64_t end);
  void (*distance_pairs_double)(const Distances<double>&, int64_t begin, int64_t end);
  void (*distance_means_float)(const Distances<float>&, int64_t begin, int64_t end);
  void (*distance_means_double)(const Distances<double>&, int64_t begin, int64_t end);
  void (*distance_losses_float)(const Distances<float>&, int64_t begin, int64_t end);
  void (*distance_losses_double)(const Distances<double>&, int64_t begin, int64_t end);
  void (*distance_gradient_float)(const Distances<float>&, int64_t begin, int64_t end);
  void (*distance_gradient_double)(const Distances<double>&, int64_t begin, int64_t end);
  void (*angle_pairs_float)(const Angles<float>&, int64_t begin, int64_t end);
  void (*angle_pairs_double)(const Angles<double>&, int64_t begin, int64_t end);
  void (*angle_losses_float)(const Angles<float>&, int64_t begin, int64_t end);
  void (*angle_losses_double)(const Angles<double>&, int64_t begin, int64_t end);
  void (*angle_gradient_float)(const Angles<float>&, int64_t begin, int64_t end);
  void (*angle_gradient_double)(const Angles<double>&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace kd::rkd_loss
