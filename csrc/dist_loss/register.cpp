// dist_loss on the CPU behind PyTorch's stable ABI: memory, threads, and the means.
#include <initializer_list>
#include <tuple>

#include "../cpu_level.h"
#include "../tensors.h"
#include "problem.h"

namespace kd::dist_loss {
namespace {

template <class Real>
Problem<Real> problem_of(const Tensor& student, const Tensor& teacher, double temperature,
                         const OptionalTensor& temperature_tensor) {
  Problem<Real> p;
  p.student = matrix_of(student, "student");
  p.teacher = matrix_of(teacher, "teacher");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "kdkernels: student and teacher must have the same shape");
  p.n = student.size(0);
  p.vocab = student.size(1);
  p.temperature = parameter<Real>(temperature, temperature_tensor, "temperature", 1);
  return p;
}

// Of correlations; 1, so a loss of 0, where there are none.
double mean_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return n == 0 ? 1 : sum / static_cast<double>(n);
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

template <class Real, class Kernel>
Result forward_in(const Tensor& student, const Tensor& teacher, double temperature,
                  const OptionalTensor& temperature_tensor, Kernel rows, Kernel columns) {
  Problem<Real> p = problem_of<Real>(student, teacher, temperature, temperature_tensor);
  auto fresh = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(student, shape, type);
  };
  Tensor losses = fresh({2}, real_type<Real>);
  Tensor row_numbers = fresh({kRowNumbers, p.n}, real_type<Real>);
  Tensor column_numbers = fresh({kColumnNumbers, p.vocab}, real_type<Real>);
  Tensor correlations = fresh({p.n + p.vocab}, ScalarType::Double);
  p.rows = static_cast<Real*>(row_numbers.data_ptr());
  p.columns = static_cast<Real*>(column_numbers.data_ptr());
  p.row_correlations = static_cast<double*>(correlations.data_ptr());
  p.column_correlations = p.row_correlations + p.n;
  over_rows(p.n, p.vocab, p, rows);
  if (p.n == 0) {
    for (int64_t i = 0; i < kColumnNumbers * p.vocab; ++i) p.columns[i] = 0;
  } else {
    over_rows((p.vocab + kStrip - 1) / kStrip, kStrip * p.n, p, columns);
  }
  Real* out = static_cast<Real*>(losses.data_ptr());
  out[0] = static_cast<Real>(1 - mean_of(p.row_correlations, p.n));
  out[1] = static_cast<Real>(p.n == 0 ? 0 : 1 - mean_of(p.column_correlations, p.vocab));
  return {losses, row_numbers, column_numbers};
}

Result forward(Tensor student, Tensor teacher, double temperature,
               OptionalTensor temperature_tensor) {
  const Kernels& k = KD_AT_CPU_LEVEL(kernels);
  if (dtype_of(student) == Dtype::float64 || dtype_of(teacher) == Dtype::float64) {
    return forward_in<double>(student, teacher, temperature, temperature_tensor, k.rows_double,
                              k.columns_double);
  }
  return forward_in<float>(student, teacher, temperature, temperature_tensor, k.rows_float,
                           k.columns_float);
}

template <class Real>
Real* numbers(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == real_type<Real> && tensor.numel() == count && tensor.is_contiguous(),
      "kdkernels: ", name, " must be contiguous, of the dtype that the op computes in, ",
      "and have ", count, " values");
  return static_cast<Real*>(const_cast<void*>(tensor.data_ptr()));
}

Tensor backward(Tensor grad, Tensor student, Tensor teacher, double temperature,
                OptionalTensor temperature_tensor, Tensor rows, Tensor columns) {
  Tensor gradient = fresh_like(student);
  const Kernels& k = KD_AT_CPU_LEVEL(kernels);
  auto run = [&](auto p, auto kernel) {
    using Real = std::remove_pointer_t<decltype(p.rows)>;
    p.gradient = matrix_of(gradient, "gradient");
    p.upstream = numbers<Real>(grad, "grad", 2);
    p.rows = numbers<Real>(rows, "rows", kRowNumbers * p.n);
    p.columns = numbers<Real>(columns, "columns", kColumnNumbers * p.vocab);
    over_rows(p.n, p.vocab, p, kernel);
  };
  if (rows.scalar_type() == ScalarType::Double) {
    run(problem_of<double>(student, teacher, temperature, temperature_tensor), k.backward_double);
  } else {
    run(problem_of<float>(student, teacher, temperature, temperature_tensor), k.backward_float);
  }
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("dist_loss", TORCH_BOX(&forward));
  m.impl("dist_loss_backward", TORCH_BOX(&backward));
}

}  // namespace kd::dist_loss
