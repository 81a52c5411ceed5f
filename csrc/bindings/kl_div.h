// The kernels of kl_div.
#pragma once

#include "../kl_div/problem.h"
#include "arrays.h"

namespace kd::kl_div {
namespace {

using namespace bindings;

const Kernels& kernels_at(const std::string& name) {
  CpuLevel level = level_named(name);
  auto cpu_level = [level] {
    return level;
  };  // instead of the function of that name, which detects
  return KD_AT_CPU_LEVEL(kernels);
}

Operand operand_of(const py::array& array, const Problem& problem) {
  Operand operand;
  operand.data = data_of(array);
  operand.dtype = dtype_of(array);
  if (array.ndim() != static_cast<int64_t>(problem.sizes.size())) {
    throw py::value_error("arrays must have the shape that they are broadcast to");
  }
  for (int64_t d = 0; d < array.ndim(); ++d) {
    if (array.shape(d) != problem.sizes[d]) {
      throw py::value_error("arrays must have the shape that they are broadcast to");
    }
    operand.strides.push_back(stride_of(array, d));
  }
  return operand;
}

Output output_of(const py::array& array, const Problem& problem) {
  if (array.size() != problem.numel || !(array.flags() & py::array::c_style)) {
    throw py::value_error("outputs must be contiguous and of the broadcast shape");
  }
  return {data_of(array), dtype_of(array)};
}

Problem problem_of(const py::array& input, const py::array& target, bool log_target) {
  Problem problem;
  problem.numel = input.size();
  for (int64_t d = 0; d < input.ndim(); ++d) problem.sizes.push_back(input.shape(d));
  problem.input = operand_of(input, problem);
  problem.target = operand_of(target, problem);
  problem.log_target = log_target;
  return problem;
}

using Tasks = void (*)(const Problem&, int64_t, int64_t);

void run(int threads, const Problem& problem, Tasks wide, Tasks narrow) {
  bool is_double = problem.input.dtype == Dtype::float64 || problem.target.dtype == Dtype::float64;
  on_threads(threads, (problem.numel + kTask - 1) / kTask,
             [&](int64_t begin, int64_t end) { (is_double ? wide : narrow)(problem, begin, end); });
}

// The terms, or where no array for them is given their sums, one a task.
py::array_t<double> forward(const std::string& level, int threads, py::array input,
                            py::array target, bool log_target, OptionalArray terms) {
  Problem problem = problem_of(input, target, log_target);
  py::array_t<double> sums(terms ? 0 : (problem.numel + kTask - 1) / kTask);
  if (terms) {
    problem.terms = output_of(*terms, problem);
  } else {
    problem.sums = sums.mutable_data();
  }
  const Kernels& table = kernels_at(level);
  run(threads, problem, table.forward_double, table.forward_float);
  return sums;
}

void backward(const std::string& level, int threads, py::array upstream, py::array input,
              py::array target, bool log_target, OptionalArray input_grad,
              OptionalArray target_grad) {
  Problem problem = problem_of(input, target, log_target);
  problem.upstream = operand_of(upstream, problem);
  if (input_grad) problem.input_grad = output_of(*input_grad, problem);
  if (target_grad) problem.target_grad = output_of(*target_grad, problem);
  const Kernels& table = kernels_at(level);
  run(threads, problem, table.backward_double, table.backward_float);
}

}  // namespace

inline void bind(py::module_ m) {
  using py::literals::operator""_a;
  py::object none = py::none();
  m.def("forward", &forward, "level"_a, "threads"_a, "input"_a, "target"_a, "log_target"_a = false,
        "terms"_a = none);
  m.def("backward", &backward, "level"_a, "threads"_a, "upstream"_a, "input"_a, "target"_a,
        "log_target"_a = false, "input_grad"_a = none, "target_grad"_a = none);
  m.attr("task") = kTask;
}

}  // namespace kd::kl_div
