// The kernels of distillation_loss, find_bad_label, and the bugs that the sanitizers must find.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "../distillation_loss/problem.h"
#include "arrays.h"

namespace kd {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

namespace bindings {
namespace {

const Kernels& kernels_at(const std::string& name) {
  CpuLevel level = level_named(name);
  auto cpu_level = [level] {
    return level;
  };  // instead of the function of that name, which detects
  return KD_AT_CPU_LEVEL(kernels);
}

template <class Name, size_t count>
int index_of(const std::string& name, const Name (&names)[count]) {
  auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw py::value_error(name);
  return static_cast<int>(found - std::begin(names));
}

constexpr const char* reduction_names[] = {"batchmean", "sum", "none", "mean"};

const int64_t* labels_of(const py::array& labels) {
  if (!py::isinstance<py::array_t<int64_t, py::array::c_style>>(labels)) {
    throw py::type_error("labels must be contiguous int64");
  }
  return static_cast<const int64_t*>(labels.data());
}

// What forward and backward share.
template <class Real>
Problem<Real> problem_of(const py::array& student, const py::array& teacher,
                         const OptionalArray& student_grad, const OptionalArray& teacher_grad,
                         const OptionalArray& labels, const std::string& divergence,
                         double label_smoothing, int64_t vocab_size) {
  Problem<Real> problem;
  problem.student = matrix_of(student);
  problem.teacher = matrix_of(teacher);
  problem.n = student.shape(0);
  problem.vocab = vocab_size;
  if (student_grad) problem.student_grad = matrix_of(*student_grad);
  if (teacher_grad) problem.teacher_grad = matrix_of(*teacher_grad);
  for (const py::array& array :
       {teacher, student_grad.value_or(student), teacher_grad.value_or(teacher)}) {
    if (array.shape(0) != problem.n || array.shape(1) < vocab_size) {
      throw py::value_error("matrices must have the student's rows and vocab_size columns");
    }
  }
  if (labels) {
    problem.labels = labels_of(*labels);
    if (labels->size() != problem.n) throw py::value_error("labels must be one a row");
  }
  problem.divergence = static_cast<Divergence>(index_of(divergence, divergence_names));
  if (problem.divergence == Divergence::dkd && !labels) throw py::value_error("dkd needs labels");
  problem.label_smoothing = label_smoothing;
  return problem;
}

// Every line starts as NaN: what a kernel forgets to write is seen in what is computed from it.
template <class Real>
py::array_t<Real> fresh(std::vector<int64_t> shape) {
  py::array_t<Real> array(shape);
  std::fill_n(array.mutable_data(), array.size(), std::numeric_limits<Real>::quiet_NaN());
  return array;
}

struct Forward {
  py::array student, teacher;
  OptionalArray student_grad, teacher_grad, labels, token_weights;
  std::string divergence;
  py::object first, second, temperature, teacher_temperature, kd_weight, ce_weight, z_loss_weight;
  py::object normalizer;  // or None
  bool t_squared;
  double label_smoothing;
  int64_t ignore_index;
  bool mask_kd;
  int64_t vocab_size;
  std::string reduction;
  bool return_stats;

  // (totals, rows, masks)
  template <class Real>
  py::tuple run(const Kernels& table, int threads) const {
    auto problem = problem_of<Real>(student, teacher, student_grad, teacher_grad, labels,
                                    divergence, label_smoothing, vocab_size);
    int64_t n = problem.n;
    if (labels && find_bad_label(problem.labels, n, ignore_index, vocab_size) >= 0) {
      throw py::index_error("a label is no column");
    }
    if (token_weights) {
      if (token_weights->size() != n) throw py::value_error("token_weights must be one a row");
      problem.token_weights = reals<Real>(*token_weights, n).data;
    }
    problem.first = parameter<Real>(first, n);
    problem.second = parameter<Real>(second, n);
    problem.temperature = parameter<Real>(temperature, n);
    problem.teacher_temperature = parameter<Real>(teacher_temperature, n);
    problem.kd_weight = parameter<Real>(kd_weight, n);
    problem.ce_weight = parameter<Real>(ce_weight, n);
    problem.z_loss_weight = parameter<Real>(z_loss_weight, n);
    problem.has_normalizer = !normalizer.is_none();
    if (problem.has_normalizer) problem.normalizer = parameter<Real>(normalizer, 1);
    problem.t_squared = t_squared;
    problem.mask_kd = mask_kd;
    problem.return_stats = return_stats;
    problem.ignore_index = ignore_index;
    problem.reduction = static_cast<Reduction>(index_of(reduction, reduction_names));
    auto rows = fresh<Real>({return_stats ? kLinesWithStats : kLines, n}),
         totals = fresh<Real>({n});
    py::array_t<uint8_t> masks(n);
    problem.rows = rows.mutable_data();
    problem.totals = totals.mutable_data();
    problem.masks = masks.mutable_data();
    prepare(problem);
    on_threads(threads, n, [&](int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<Real, float>) {
        table.forward_float(problem, begin, end);
      } else {
        table.forward_double(problem, begin, end);
      }
    });
    return py::make_tuple(totals, rows, masks);
  }
};

bool is_double(const py::array& student, const py::array& teacher) {
  return dtype_of(student) == Dtype::float64 || dtype_of(teacher) == Dtype::float64;
}

py::tuple forward(const std::string& level, int threads, py::array student, py::array teacher,
                  OptionalArray student_grad, OptionalArray teacher_grad, OptionalArray labels,
                  OptionalArray token_weights, const std::string& divergence, py::object first,
                  py::object second, py::object temperature, py::object teacher_temperature,
                  py::object kd_weight, py::object ce_weight, py::object z_loss_weight,
                  py::object normalizer, bool t_squared, double label_smoothing,
                  int64_t ignore_index, bool mask_kd, int64_t vocab_size,
                  const std::string& reduction, bool return_stats) {
  Forward call{student,
               teacher,
               student_grad,
               teacher_grad,
               labels,
               token_weights,
               divergence,
               first,
               second,
               temperature,
               teacher_temperature,
               kd_weight,
               ce_weight,
               z_loss_weight,
               normalizer,
               t_squared,
               label_smoothing,
               ignore_index,
               mask_kd,
               vocab_size,
               reduction,
               return_stats};
  const Kernels& table = kernels_at(level);
  return is_double(student, teacher) ? call.run<double>(table, threads)
                                     : call.run<float>(table, threads);
}

template <class Real>
void run_backward(const Kernels& table, int threads, const py::array& upstream,
                  const py::array& rows, Problem<Real> problem) {
  if (!py::isinstance<py::array_t<Real, py::array::c_style>>(rows) || rows.ndim() != 2 ||
      rows.shape(0) < kLines || rows.shape(1) != problem.n) {
    throw py::value_error("rows is not what the forward returned");
  }
  problem.rows = reinterpret_cast<Real*>(data_of(rows));
  Parameter<Real> factor = reals<Real>(upstream, problem.n);
  problem.upstream = factor.data;
  problem.upstream_stride = factor.stride;
  on_threads(threads, problem.n, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Real, float>) {
      table.backward_float(problem, begin, end);
    } else {
      table.backward_double(problem, begin, end);
    }
  });
}

void backward(const std::string& level, int threads, py::array upstream, py::array student,
              py::array teacher, py::array rows, OptionalArray student_grad,
              OptionalArray teacher_grad, OptionalArray labels, const std::string& divergence,
              double label_smoothing, int64_t vocab_size) {
  auto run = [&](auto problem) {
    run_backward(kernels_at(level), threads, upstream, rows, problem);
  };
  if (is_double(student, teacher)) {
    run(problem_of<double>(student, teacher, student_grad, teacher_grad, labels, divergence,
                           label_smoothing, vocab_size));
  } else {
    run(problem_of<float>(student, teacher, student_grad, teacher_grad, labels, divergence,
                          label_smoothing, vocab_size));
  }
}

void scale_rows(const std::string& level, int threads, py::array array, py::array factor) {
  const Kernels& table = kernels_at(level);
  Matrix matrix = matrix_of(array);
  int64_t n = array.shape(0);
  auto run = [&](auto by, auto rows) {
    on_threads(threads, n, [&](int64_t begin, int64_t end) {
      rows(matrix, matrix, by.data, by.stride, begin, end);
    });
  };
  if (dtype_of(factor) == Dtype::float64) {
    run(reals<double>(factor, n), table.scale_double);
  } else {
    run(reals<float>(factor, n), table.scale_float);
  }
}

// A bug in how a kernel is called on a row of 8, for each of the sanitizers to find inside the
// kernel.
void planted(const std::string& bug, py::array row) {
  auto scale = kernels_baseline.scale_float;
  float factor = 2;
  Matrix matrix = matrix_of(row);
  if (bug == "one column too many") {
    matrix.columns += 1;
    scale(matrix, matrix, &factor, 0, 0, 1);
  } else if (bug == "offset of a row past 2^63") {
    int64_t far = std::numeric_limits<int64_t>::max() / matrix.stride;
    scale(matrix, matrix, &factor, 0, far, far + 1);
  } else if (bug == "one row given to two threads") {
    on_threads(2, 2, [&](int64_t, int64_t) { scale(matrix, matrix, &factor, 0, 0, 1); });
  } else {
    throw py::value_error(bug);
  }
}

}  // namespace

inline void bind(py::module_ m) {
  using py::literals::operator""_a;
  py::object none = py::none();
  m.def("forward", &forward, "level"_a, "threads"_a, "student"_a, "teacher"_a, py::kw_only(),
        "student_grad"_a = none, "teacher_grad"_a = none, "labels"_a = none,
        "token_weights"_a = none, "divergence"_a = "forward_kl", "first"_a = 0.0, "second"_a = 0.0,
        "temperature"_a = 1.0, "teacher_temperature"_a = 1.0, "kd_weight"_a = 1.0,
        "ce_weight"_a = 0.0, "z_loss_weight"_a = 0.0, "normalizer"_a = none, "t_squared"_a = true,
        "label_smoothing"_a = 0.0, "ignore_index"_a = -100, "mask_kd"_a = true, "vocab_size"_a,
        "reduction"_a = "batchmean", "return_stats"_a = false);
  m.def("backward", &backward, "level"_a, "threads"_a, "upstream"_a, "student"_a, "teacher"_a,
        "rows"_a, py::kw_only(), "student_grad"_a = none, "teacher_grad"_a = none,
        "labels"_a = none, "divergence"_a = "forward_kl", "label_smoothing"_a = 0.0,
        "vocab_size"_a);
  m.def("scale_rows", &scale_rows, "level"_a, "threads"_a, "grad"_a, "factor"_a);
  m.def("find_bad_label", [](py::array labels, int64_t ignore_index, int64_t vocab_size) {
    return find_bad_label(labels_of(labels), labels.size(), ignore_index, vocab_size);
  });
  m.def("planted", &planted);
}

}  // namespace bindings
}  // namespace kd
