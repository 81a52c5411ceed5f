// distillation_loss on the CPU behind PyTorch's stable ABI: label check, scratch, threads.
#include <type_traits>

#include "../cpu_level.h"
#include "../logit_rows/problem.h"
#include "../scratch.h"
#include "ops.h"

namespace kd {
namespace {

// rows(problem, begin, end) on torch's threads. With a center each row of the teacher less the
// center goes through a scratch that stays in the second-level cache: N×V centred logits never
// exist.
template <class Real>
void over_rows_of(const Problem<Real>& problem, const OptionalTensor& center,
                  void (*rows)(const Problem<Real>&, int64_t, int64_t)) {
  if (!center) return over_rows(problem.n, problem.vocab, problem, rows);
  int64_t columns = problem.teacher.columns;
  STD_TORCH_CHECK(center->dim() == 1 && center->size(0) == columns &&
                      center->scalar_type() == real_type<Real> && center->is_contiguous(),
                  "kdkernels: teacher_center must be contiguous, of the dtype that the op computes "
                  "in, one value for each of the teacher's columns");
  const Real* of_column = static_cast<const Real*>(center->data_ptr());
  auto subtract = logit_rows::kernels<Real>().subtract;
  auto centred = [&](const Problem<Real>& whole, int64_t begin, int64_t end) {
    thread_local Scratch<Real> scratch;
    Real* row = scratch.get(columns);
    Problem<Real> one = whole;
    Dtype real = std::is_same_v<Real, float> ? Dtype::float32 : Dtype::float64;
    one.teacher = {reinterpret_cast<char*>(row), real, 0, columns};  // every row is this one
    for (int64_t i = begin; i < end; ++i) {
      subtract(whole.teacher, i, of_column, row);
      rows(one, i, i + 1);
    }
  };
  over_rows(problem.n, problem.vocab, problem, centred);
}

template <class Real>
std::tuple<Tensor, Tensor> run_forward(const Tensor& student, const Tensor& teacher,
                                       const Options& o, const Tensor* student_grad,
                                       const Tensor* teacher_grad) {
  auto [problem, loss, rows] = forward_of<Real>(student, teacher, o, student_grad, teacher_grad);
  check_labels(problem.labels, problem.n, problem.ignore_index, problem.vocab);
  bool none = problem.reduction == Reduction::none;
  std::vector<uint8_t> masks(problem.n);
  std::vector<Real> totals(none ? 0 : problem.n);
  problem.masks = masks.data();
  if (!none) problem.totals = totals.data();

  prepare(problem);
  if constexpr (std::is_same_v<Real, float>) {
    over_rows_of(problem, o.teacher_center, kernels().forward_float);
  } else {
    over_rows_of(problem, o.teacher_center, kernels().forward_double);
  }
  if (!none) {
    double sum = 0;
    for (Real total : totals) sum += total;
    *static_cast<Real*>(loss.data_ptr()) = static_cast<Real>(sum);
  }
  return {loss, rows};
}

std::tuple<Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher,
                                   const Options& options, const Tensor* student_grad,
                                   const Tensor* teacher_grad) {
  return is_double(student, teacher)
             ? run_forward<double>(student, teacher, options, student_grad, teacher_grad)
             : run_forward<float>(student, teacher, options, student_grad, teacher_grad);
}

template <class Real>
void run_backward(const Problem<Real>& problem, const OptionalTensor& center) {
  if constexpr (std::is_same_v<Real, float>) {
    over_rows_of(problem, center, kernels().backward_float);
  } else {
    over_rows_of(problem, center, kernels().backward_double);
  }
}

void backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
              const Tensor& rows, const OptionalTensor& labels, const std::string& divergence,
              double label_smoothing, int64_t vocab_size, const OptionalTensor& center,
              const Tensor* student_grad, const Tensor* teacher_grad) {
  auto run = [&](auto problem_of_call) {
    run_backward(problem_of_call(grad_loss, student, teacher, rows, labels, divergence,
                                 label_smoothing, vocab_size, student_grad, teacher_grad),
                 center);
  };
  is_double(student, teacher) ? run(backward_of<double>) : run(backward_of<float>);
}

void scale_rows_(Tensor grad, Tensor factor) {
  Matrix matrix = matrix_of(grad, "grad");
  int64_t n = grad.size(0), stride = factor.numel() == 1 ? 0 : 1;
  Tensor by = factor.is_contiguous() ? factor : torch::stable::contiguous(factor);
  torch::stable::parallel_for(0, n, grain(matrix.columns + 1), [&](int64_t begin, int64_t end) {
    if (dtype_of(by) == Dtype::float64) {
      kernels().scale_double(matrix, matrix, reals<double>(by, "factor", n), stride, begin, end);
    } else {
      kernels().scale_float(matrix, matrix, reals<float>(by, "factor", n), stride, begin, end);
    }
  });
}

int64_t cpu_level_number() { return cpu_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss<forward>));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward<backward>));
  m.impl("distillation_loss_and_grad", TORCH_BOX(&distillation_loss_and_grad<forward>));
  m.impl("distillation_loss_and_grad_", TORCH_BOX(&distillation_loss_and_grad_<forward>));
  m.impl("distillation_loss_and_grad_into", TORCH_BOX(&distillation_loss_and_grad_into<forward>));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level_number));
}

}  // namespace kd
