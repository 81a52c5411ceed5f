// One call of softmax or log_softmax as plain pointers and sizes, and the kernels that serve it. No
// torch header.
#pragma once

#include "../arguments.h"

namespace kd::softmax {

template <class Real>
struct Problem {
  Matrix x;         // forward: the input; backward: the upstream gradient
  Matrix output;    // forward: written; backward: what the forward wrote
  Matrix gradient;  // backward only
  Parameter<Real> temperature;
  bool log = false;
};

// Rows begin ≤ i < end.
struct Kernels {
  void (*forward_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*forward_double)(const Problem<double>&, int64_t begin, int64_t end);
  void (*backward_float)(const Problem<float>&, int64_t begin, int64_t end);
  void (*backward_double)(const Problem<double>&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace kd::softmax
