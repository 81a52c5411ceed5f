// One call of kl_div as plain pointers and sizes, and the kernels that serve it. No torch header.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace kd::kl_div {

// A tensor of the broadcast shape: one stride, in elements, for each of Problem::sizes.
struct Operand {
  const char* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::vector<int64_t> strides;
};

// A contiguous tensor of the broadcast shape; no data where it is not wanted.
struct Output {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
};

struct Problem {
  int64_t numel = 0;
  std::vector<int64_t> sizes;  // at least one
  Operand input, target;
  bool log_target = false;

  // forward: either the terms, or their sums, one a task
  Output terms;
  double* sums = nullptr;

  // backward
  Operand upstream;
  Output input_grad, target_grad;
};

// Elements of a task, in logical order. Fixed, so that a sum does not depend on the number of
// threads.
constexpr int64_t kTask = 16384;

// Tasks begin ≤ k < end.
struct Kernels {
  void (*forward_float)(const Problem&, int64_t begin, int64_t end);
  void (*forward_double)(const Problem&, int64_t begin, int64_t end);
  void (*backward_float)(const Problem&, int64_t begin, int64_t end);
  void (*backward_double)(const Problem&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace kd::kl_div
