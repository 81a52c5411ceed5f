// One call of dist_loss as plain pointers and sizes, and the kernels that serve it. No torch
// header. The schemas and what every argument means are in kdkernels/ops/dist_loss/__init__.py.
#pragma once

#include "../arguments.h"

namespace kd::dist_loss {

// What the forward keeps, by row in `rows` (kRowNumbers, N): both rows' maximum and log Σ
// exp((x − maximum)/τ), and what the correlation's derivative by p multiplies: `by_teacher`·(q −
// mean q) − `by_student`·(p − mean p); by column in `columns` (kColumnNumbers, V).
enum RowNumber {
  student_maximum,
  student_log_sum,
  teacher_maximum,
  teacher_log_sum,
  row_by_teacher,
  row_by_student,
  kRowNumbers
};
enum ColumnNumber {
  student_mean,
  teacher_mean,
  column_by_teacher,
  column_by_student,
  kColumnNumbers
};

template <class Real>
struct Problem {
  Matrix student, teacher, gradient;
  int64_t n = 0, vocab = 0;
  Parameter<Real> temperature;
  Real *rows = nullptr, *columns = nullptr;
  double *row_correlations = nullptr, *column_correlations = nullptr;  // forward: (N), (V)
  const Real* upstream = nullptr;                                      // backward: two
};

// Columns handled together by the column kernel: their sums stay in the first-level cache.
constexpr int64_t kStrip = 512;

// Rows begin ≤ i < end, and strips of kStrip columns.
struct Kernels {
  void (*rows_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*rows_double)(const Problem<double>&, int64_t begin, int64_t end);
  void (*columns_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*columns_double)(const Problem<double>&, int64_t begin, int64_t end);
  void (*backward_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*backward_double)(const Problem<double>&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace kd::dist_loss
