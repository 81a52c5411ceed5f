// What the registered functions share: views of torch tensors as the kernels' plain structs, and fresh outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtype.h"

namespace kd {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

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
      STD_TORCH_CHECK(false, "kdkernels: a tensor's dtype is none of float64, float32, bfloat16, float16");
  }
}

// Asks for huge pages behind a fresh output before it is written for the first time: 4 KiB pages cost 0.8–1.1 ns per
// bfloat16 element to touch, more than the loss itself; with huge pages 0.2–0.3 (measured where THP is "madvise").
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = 2u << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  // Only advice: where the kernel does not take it, the pages are small and nothing else changes.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kd
