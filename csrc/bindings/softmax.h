// The kernels of softmax and log_softmax.
#pragma once

#include "../softmax/problem.h"
#include "arrays.h"

namespace kd::softmax {
namespace {

using namespace bindings;

const Kernels& kernels_at(const std::string& name) {
  CpuLevel level = level_named(name);
  auto cpu_level = [level] {
    return level;
  };  // instead of the function of that name, which detects
  return KD_AT_CPU_LEVEL(kernels);
}

template <class Real>
Problem<Real> problem_of(const py::array& x, const py::array& output, const py::object& temperature,
                         bool log) {
  if (output.ndim() != 2 || output.shape(0) != x.shape(0) || output.shape(1) != x.shape(1)) {
    throw py::value_error("matrices must have one shape");
  }
  Problem<Real> problem;
  problem.x = matrix_of(x);
  problem.output = matrix_of(output);
  problem.temperature = parameter<Real>(temperature, x.shape(0));
  problem.log = log;
  return problem;
}

void forward(const std::string& level, int threads, py::array x, py::array output,
             py::object temperature, bool log) {
  const Kernels& table = kernels_at(level);
  auto run = [&](auto problem, auto rows) {
    on_threads(threads, x.shape(0), [&](int64_t begin, int64_t end) { rows(problem, begin, end); });
  };
  if (dtype_of(x) == Dtype::float64) {
    run(problem_of<double>(x, output, temperature, log), table.forward_double);
  } else {
    run(problem_of<float>(x, output, temperature, log), table.forward_float);
  }
}

void backward(const std::string& level, int threads, py::array upstream, py::array output,
              py::array gradient, py::object temperature, bool log) {
  const Kernels& table = kernels_at(level);
  auto run = [&](auto problem, auto rows) {
    problem.gradient = matrix_of(gradient);
    on_threads(threads, upstream.shape(0),
               [&](int64_t begin, int64_t end) { rows(problem, begin, end); });
  };
  if (dtype_of(output) == Dtype::float64) {
    run(problem_of<double>(upstream, output, temperature, log), table.backward_double);
  } else {
    run(problem_of<float>(upstream, output, temperature, log), table.backward_float);
  }
}

}  // namespace

inline void bind(py::module_ m) {
  using py::literals::operator""_a;
  m.def("forward", &forward, "level"_a, "threads"_a, "x"_a, "output"_a, "temperature"_a = 1.0,
        "log"_a = false);
  m.def("backward", &backward, "level"_a, "threads"_a, "upstream"_a, "output"_a, "gradient"_a,
        "temperature"_a = 1.0, "log"_a = false);
}

}  // namespace kd::softmax
