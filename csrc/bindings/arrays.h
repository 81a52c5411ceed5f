// NumPy arrays as the kernels' plain structs, and row ranges on threads. What the bindings of all
// ops share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../arguments.h"
#include "../cpu_level.h"

namespace kd::bindings {

namespace py = pybind11;
using OptionalArray = std::optional<py::array>;

inline CpuLevel level_named(const std::string& name) {
  CpuLevel level = name == "avx512" ? avx512 : name == "avx2" ? avx2 : baseline;
  if (level == baseline && name != "baseline") throw py::value_error("no CPU level " + name);
  if (level > cpu_level()) throw py::value_error("this CPU has no " + name);
  return level;
}

// NumPy has no bfloat16: its bits come as uint16.
inline Dtype dtype_of(const py::array& array) {
  if (array.dtype().equal(py::dtype::of<double>())) return Dtype::float64;
  if (array.dtype().equal(py::dtype::of<float>())) return Dtype::float32;
  if (array.dtype().equal(py::dtype::of<uint16_t>())) return Dtype::bfloat16;
  if (array.dtype().equal(py::dtype("float16"))) return Dtype::float16;
  throw py::type_error("an array's dtype is none of float64, float32, uint16 (bfloat16), float16");
}

inline char* data_of(const py::array& array) {
  return static_cast<char*>(const_cast<void*>(array.data()));
}

inline int64_t stride_of(const py::array& array, int64_t dimension) {
  int64_t bytes = array.strides(dimension), size = size_of(dtype_of(array));
  if (bytes % size != 0) throw py::value_error("a stride is not a multiple of the element");
  return bytes / size;
}

inline Matrix matrix_of(const py::array& array) {
  if (array.ndim() != 2) throw py::value_error("a matrix must have two dimensions");
  if (array.size() > 0 && array.shape(1) > 1 && stride_of(array, 1) != 1) {
    throw py::value_error("a matrix must have columns of stride 1");
  }
  return {data_of(array), dtype_of(array), stride_of(array, 0), array.shape(1)};
}

// One value (stride 0) or one a row.
template <class Real>
Parameter<Real> reals(const py::array& array, int64_t n) {
  if (!py::isinstance<py::array_t<Real, py::array::c_style>>(array)) {
    throw py::type_error("an array is not contiguous and of the dtype that the op computes in");
  }
  if (array.size() != 1 && array.size() != n) throw py::value_error("not one value, or one a row");
  Parameter<Real> result;
  result.data = static_cast<const Real*>(array.data());
  result.stride = array.size() == 1 ? 0 : 1;
  return result;
}

// A number or such an array.
template <class Real>
Parameter<Real> parameter(const py::object& object, int64_t n) {
  if (py::isinstance<py::array>(object)) return reals<Real>(object.cast<py::array>(), n);
  Parameter<Real> result;
  result.value = object.cast<double>();
  return result;
}

// work(begin, end) for 0 ≤ i < n in `threads` pieces. Never on the caller's thread: a new thread
// has a new scratch, which ends where this problem's does, so that AddressSanitizer sees what lies
// behind it.
template <class Work>
void on_threads(int threads, int64_t n, const Work& work) {
  py::gil_scoped_release release;
  std::vector<std::thread> all;
  for (int k = 0; k < threads; ++k) {
    all.emplace_back([&work, n, k, threads] { work(n * k / threads, n * (k + 1) / threads); });
  }
  for (std::thread& thread : all) thread.join();
}

}  // namespace kd::bindings
