// What the registered functions share: views of torch tensors as the kernels' plain structs, and
// fresh outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "arguments.h"

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false,
                      "kdkernels: a tensor's dtype is none of float64, float32, bfloat16, float16");
  }
}

template <class Real>
constexpr ScalarType real_type =
    std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "kdkernels: ", name, " must have two dimensions");
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.size(0) == 0 || tensor.stride(1) == 1,
                  "kdkernels: ", name, " must have columns of stride 1");
  return {static_cast<char*>(const_cast<void*>(tensor.data_ptr())), dtype_of(tensor),
          tensor.stride(0), tensor.size(1)};
}

template <class Real>
const Real* reals(const Tensor& tensor, const char* name, int64_t n) {
  STD_TORCH_CHECK(tensor.scalar_type() == real_type<Real>, "kdkernels: ", name,
                  " must have the dtype that the op computes in");
  STD_TORCH_CHECK(tensor.numel() == 1 || tensor.numel() == n, "kdkernels: ", name,
                  " must have one value, or one a row");
  STD_TORCH_CHECK(tensor.dim() == 0 || tensor.numel() <= 1 || tensor.stride(0) == 1,
                  "kdkernels: ", name, " must be contiguous");
  return static_cast<const Real*>(tensor.data_ptr());
}

template <class Real>
Parameter<Real> parameter(double value, const OptionalTensor& tensor, const char* name, int64_t n) {
  Parameter<Real> result;
  result.value = value;
  if (tensor) {
    result.data = reals<Real>(*tensor, name, n);
    result.stride = tensor->numel() == 1 ? 0 : 1;
  }
  return result;
}

// An output, not yet touched. MADV_HUGEPAGE would halve what its first touch costs (11 ms instead
// of 22 for forward KL, float32, 512×32000) as long as huge pages are free; once memory is
// fragmented the kernel compacts it first, and the same call takes 85 ms. MADV_POPULATE_WRITE took
// 31 ms.
inline Tensor fresh_like(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

// rows(problem, begin, end) for pieces of the n rows, on torch's threads.
template <class Problem, class RowFunction>
void over_rows(int64_t n, int64_t columns, const Problem& problem, RowFunction rows) {
  torch::stable::parallel_for(0, n, grain(columns),
                              [&](int64_t begin, int64_t end) { rows(problem, begin, end); });
}

}  // namespace kd
