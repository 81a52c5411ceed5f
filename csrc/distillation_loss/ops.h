// What the registered functions of distillation_loss share between devices: everything but the run
// over the rows. The schemas and what every argument means are in
// kdkernels/ops/distillation_loss/__init__.py.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "problem.h"

namespace kd {

inline Divergence divergence_named(const std::string& name) {
  int which = 0;
  for (const char* known : divergence_names) {
    if (name == known) return static_cast<Divergence>(which);
    ++which;
  }
  STD_TORCH_CHECK(false, "kdkernels: divergence '", name, "' is unknown to the C++ library");
}

inline Reduction reduction_named(const std::string& name) {
  if (name == "batchmean") return Reduction::batchmean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  STD_TORCH_CHECK(name == "mean", "kdkernels: reduction '", name, "' is unknown");
  return Reduction::mean;
}

inline void check_labels(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t vocab) {
  int64_t bad = labels ? find_bad_label(labels, n, ignore_index, vocab) : -1;
  if (bad < 0) return;
  std::ostringstream text;  // the text of label_error() in Python
  text << "labels[" << bad << "] is " << labels[bad] << "; accepted: 0 to " << vocab - 1
       << ", or ignore_index " << ignore_index;
  throw std::runtime_error(text.str());
}

inline bool is_double(const Tensor& student, const Tensor& teacher) {
  return dtype_of(student) == Dtype::float64 || dtype_of(teacher) == Dtype::float64;
}

// Everything of a problem that forward and backward share.
template <class Real>
Problem<Real> problem_of(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                         const std::string& divergence, double label_smoothing,
                         int64_t vocab_size) {
  Problem<Real> problem;
  problem.student = matrix_of(student, "student");
  problem.teacher = matrix_of(teacher, "teacher");
  problem.n = student.size(0);
  problem.vocab = vocab_size;
  STD_TORCH_CHECK(teacher.size(0) == problem.n,
                  "kdkernels: student and teacher must have the same rows");
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= student.size(1) && vocab_size <= teacher.size(1),
                  "kdkernels: vocab_size must be 1 to the columns given");
  if (labels) {
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->numel() == problem.n &&
                        (problem.n <= 1 || labels->stride(0) == 1),
                    "kdkernels: labels must be int64, contiguous, one a row");
    problem.labels = static_cast<const int64_t*>(labels->data_ptr());
  }
  problem.divergence = divergence_named(divergence);
  STD_TORCH_CHECK(problem.divergence != Divergence::dkd || labels, "kdkernels: dkd needs labels");
  problem.label_smoothing = label_smoothing;
  return problem;
}

// The options of a forward, in the order of the schema.
struct Options {
  OptionalTensor labels, token_weights;
  std::string divergence;
  double first;
  OptionalTensor first_tensor;
  double second;
  OptionalTensor second_tensor;
  double temperature;
  OptionalTensor temperature_tensor;
  double teacher_temperature;
  OptionalTensor teacher_temperature_tensor;
  double kd_weight;
  OptionalTensor kd_weight_tensor;
  double ce_weight;
  OptionalTensor ce_weight_tensor;
  double z_loss_weight;
  OptionalTensor z_loss_weight_tensor;
  std::optional<double> normalizer;
  OptionalTensor normalizer_tensor;
  bool t_squared;
  double label_smoothing;
  int64_t ignore_index;
  bool mask_kd;
  int64_t vocab_size;
  std::string reduction;
  bool return_stats;
  OptionalTensor teacher_center;  // (columns): taken from the teacher's rows as they are read
};

// A forward's problem but for what a device computes it with: masks, and totals unless they are the
// loss.
template <class Real>
struct Forward {
  Problem<Real> problem;
  Tensor loss, rows;
};

template <class Real>
Forward<Real> forward_of(const Tensor& student, const Tensor& teacher, const Options& o,
                         const Tensor* student_grad, const Tensor* teacher_grad) {
  Problem<Real> problem =
      problem_of<Real>(student, teacher, o.labels, o.divergence, o.label_smoothing, o.vocab_size);
  int64_t n = problem.n;
  if (o.token_weights) {
    problem.token_weights = reals<Real>(*o.token_weights, "token_weights", n);
    STD_TORCH_CHECK(o.token_weights->numel() == n,
                    "kdkernels: token_weights must have one value a row");
  }
  problem.first = parameter<Real>(o.first, o.first_tensor, "first", n);
  problem.second = parameter<Real>(o.second, o.second_tensor, "second", n);
  problem.temperature = parameter<Real>(o.temperature, o.temperature_tensor, "temperature", n);
  problem.teacher_temperature = parameter<Real>(o.teacher_temperature, o.teacher_temperature_tensor,
                                                "teacher_temperature", n);
  problem.kd_weight = parameter<Real>(o.kd_weight, o.kd_weight_tensor, "kd_weight", n);
  problem.ce_weight = parameter<Real>(o.ce_weight, o.ce_weight_tensor, "ce_weight", n);
  problem.z_loss_weight =
      parameter<Real>(o.z_loss_weight, o.z_loss_weight_tensor, "z_loss_weight", n);
  problem.has_normalizer = o.normalizer || o.normalizer_tensor;
  problem.normalizer =
      parameter<Real>(o.normalizer.value_or(0), o.normalizer_tensor, "normalizer", 1);
  problem.t_squared = o.t_squared;
  problem.mask_kd = o.mask_kd;
  problem.return_stats = o.return_stats;
  problem.ignore_index = o.ignore_index;
  problem.reduction = reduction_named(o.reduction);
  bool none = problem.reduction == Reduction::none;

  auto real = std::make_optional(real_type<Real>);
  Tensor rows = torch::stable::new_empty(
      student, {o.return_stats ? int64_t(kLinesWithStats) : int64_t(kLines), n}, real);
  Tensor loss = none ? torch::stable::new_empty(student, {n}, real)
                     : torch::stable::new_empty(student, std::vector<int64_t>{}, real);
  problem.rows = static_cast<Real*>(rows.data_ptr());
  if (none) problem.totals = static_cast<Real*>(loss.data_ptr());
  if (student_grad) problem.student_grad = matrix_of(*student_grad, "student_grad");
  if (teacher_grad) problem.teacher_grad = matrix_of(*teacher_grad, "teacher_grad");
  return {problem, loss, rows};
}

template <class Real>
void check_rows(const Tensor& rows, const Problem<Real>& problem) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) >= kLines && rows.size(1) == problem.n &&
                      rows.scalar_type() == real_type<Real> && rows.is_contiguous(),
                  "kdkernels: rows is not what the forward returned for these logits");
}

template <class Real>
Problem<Real> backward_of(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                          const Tensor& rows, const OptionalTensor& labels,
                          const std::string& divergence, double label_smoothing, int64_t vocab_size,
                          const Tensor* student_grad, const Tensor* teacher_grad) {
  Problem<Real> problem =
      problem_of<Real>(student, teacher, labels, divergence, label_smoothing, vocab_size);
  check_rows(rows, problem);
  problem.rows = static_cast<Real*>(rows.data_ptr());
  problem.upstream = reals<Real>(grad_loss, "grad_loss", problem.n);
  problem.upstream_stride = grad_loss.numel() == 1 ? 0 : 1;
  if (student_grad) problem.student_grad = matrix_of(*student_grad, "student_grad");
  if (teacher_grad) problem.teacher_grad = matrix_of(*teacher_grad, "teacher_grad");
  return problem;
}

// The forward ops' parameters after student and teacher, once for each of the three that take them.
#define KD_OPTIONS                                                                                 \
  OptionalTensor labels, OptionalTensor token_weights, std::string divergence, double first,       \
      OptionalTensor first_tensor, double second, OptionalTensor second_tensor,                    \
      double temperature, OptionalTensor temperature_tensor, double teacher_temperature,           \
      OptionalTensor teacher_temperature_tensor, double kd_weight,                                 \
      OptionalTensor kd_weight_tensor, double ce_weight, OptionalTensor ce_weight_tensor,          \
      double z_loss_weight, OptionalTensor z_loss_weight_tensor, std::optional<double> normalizer, \
      OptionalTensor normalizer_tensor, bool t_squared, double label_smoothing,                    \
      int64_t ignore_index, bool mask_kd, int64_t vocab_size, std::string reduction,               \
      bool return_stats
#define KD_TAKE_OPTIONS                                                                         \
  Options {                                                                                     \
    labels, token_weights, divergence, first, first_tensor, second, second_tensor, temperature, \
        temperature_tensor, teacher_temperature, teacher_temperature_tensor, kd_weight,         \
        kd_weight_tensor, ce_weight, ce_weight_tensor, z_loss_weight, z_loss_weight_tensor,     \
        normalizer, normalizer_tensor, t_squared, label_smoothing, ignore_index, mask_kd,       \
        vocab_size, reduction, return_stats                                                     \
  }

inline Options with_center(Options options, OptionalTensor teacher_center) {
  options.teacher_center = std::move(teacher_center);
  return options;
}

// The ops. forward(student, teacher, Options, student_grad, teacher_grad) gives (loss, rows) and
// fills the gradients that are not null; backward takes what backward_of takes and fills likewise.

template <auto& forward>
std::tuple<Tensor, Tensor> distillation_loss(Tensor student, Tensor teacher, KD_OPTIONS,
                                             OptionalTensor teacher_center) {
  return forward(student, teacher, with_center(KD_TAKE_OPTIONS, teacher_center), nullptr, nullptr);
}

inline Tensor empty_gradient(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

template <auto& forward>
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss_and_grad(
    Tensor student, Tensor teacher, KD_OPTIONS, bool teacher_grad, OptionalTensor teacher_center) {
  Tensor gs = fresh_like(student),
         gt = teacher_grad ? fresh_like(teacher) : empty_gradient(teacher);
  auto [loss, rows] = forward(student, teacher, with_center(KD_TAKE_OPTIONS, teacher_center), &gs,
                              teacher_grad ? &gt : nullptr);
  return {loss, rows, gs, gt};
}

template <auto& forward>
std::tuple<Tensor, Tensor, Tensor> distillation_loss_and_grad_(Tensor student, Tensor teacher,
                                                               KD_OPTIONS, bool teacher_grad,
                                                               OptionalTensor teacher_center) {
  Tensor gt = teacher_grad ? fresh_like(teacher) : empty_gradient(teacher);
  auto [loss, rows] = forward(student, teacher, with_center(KD_TAKE_OPTIONS, teacher_center),
                              &student, teacher_grad ? &gt : nullptr);
  return {loss, rows, gt};
}

template <auto& forward>
std::tuple<Tensor, Tensor, Tensor> distillation_loss_and_grad_into(Tensor student, Tensor teacher,
                                                                   KD_OPTIONS, bool teacher_grad,
                                                                   Tensor grad) {
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == student.size(0) && grad.size(1) == student.size(1),
      "kdkernels: grad must have the student's rows and columns");
  Tensor gt = teacher_grad ? fresh_like(teacher) : empty_gradient(teacher);
  auto [loss, rows] =
      forward(student, teacher, KD_TAKE_OPTIONS, &grad, teacher_grad ? &gt : nullptr);
  return {loss, rows, gt};
}

template <auto& backward>
std::tuple<Tensor, Tensor> distillation_loss_backward(Tensor grad_loss, Tensor student,
                                                      Tensor teacher, Tensor rows,
                                                      OptionalTensor labels, std::string divergence,
                                                      double label_smoothing, int64_t vocab_size,
                                                      bool student_grad, bool teacher_grad,
                                                      OptionalTensor teacher_center) {
  Tensor gs = student_grad ? fresh_like(student) : empty_gradient(student);
  Tensor gt = teacher_grad ? fresh_like(teacher) : empty_gradient(teacher);
  Tensor upstream = grad_loss.is_contiguous() ? grad_loss : torch::stable::contiguous(grad_loss);
  backward(upstream, student, teacher, rows, labels, divergence, label_smoothing, vocab_size,
           teacher_center, student_grad ? &gs : nullptr, teacher_grad ? &gt : nullptr);
  return {gs, gt};
}

}  // namespace kd
