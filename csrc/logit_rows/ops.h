// What the registered functions of logit_rows share between devices: checks, and tensors as the
// kernels' plain structs. The schemas are in kdkernels/ops/distillation_loss/ops.py.
#pragma once

#include <string>
#include <utility>

#include "../distillation_loss/ops.h"
#include "problem.h"

namespace kd::logit_rows {

inline Matrix checked(const Tensor& x, const char* name, int64_t vocab_size) {
  Matrix matrix = matrix_of(x, name);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= x.size(1),
                  "kdkernels: vocab_size must be 1 to the columns given");
  return matrix;
}

template <class Real>
const Real* one_a_row(const Tensor& x, const char* name, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == n, "kdkernels: ", name,
                  " must have one value a row");
  return reals<Real>(x, name, n);
}

template <class Real>
Centered<Real> centered_of(const Tensor& grad, const Tensor& x, const Tensor& mean,
                           const Tensor& factor, int64_t vocab_size) {
  int64_t n = x.size(0);
  STD_TORCH_CHECK(grad.size(0) == n, "kdkernels: grad and x must have the same rows");
  return {vocab_size, checked(grad, "grad", vocab_size), checked(x, "x", vocab_size),
          one_a_row<Real>(mean, "mean", n), one_a_row<Real>(factor, "factor", n)};
}

template <class Real>
Problem<Real> sums_of(const Tensor& student, const Tensor& teacher, const Tensor& rows,
                      const OptionalTensor& labels, const std::string& divergence,
                      int64_t vocab_size) {
  auto problem = problem_of<Real>(student, teacher, labels, divergence, 0, vocab_size);
  check_rows(rows, problem);
  problem.rows = static_cast<Real*>(rows.data_ptr());
  return problem;
}

template <class Real>
std::pair<Adaptive<Real>, Tensor> adaptive_of(const Tensor& student, const Tensor& teacher,
                                              const Tensor& temperature,
                                              const Tensor& teacher_temperature,
                                              int64_t vocab_size) {
  int64_t n = student.size(0);
  STD_TORCH_CHECK(teacher.size(0) == n, "kdkernels: student and teacher must have the same rows");
  Tensor out = torch::stable::new_empty(student, {n}, real_type<Real>);
  Adaptive<Real> problem{vocab_size,
                         checked(student, "student", vocab_size),
                         checked(teacher, "teacher", vocab_size),
                         parameter<Real>(0, temperature, "temperature", n),
                         parameter<Real>(0, teacher_temperature, "teacher_temperature", n),
                         static_cast<Real*>(out.data_ptr())};
  return {problem, out};
}

}  // namespace kd::logit_rows
