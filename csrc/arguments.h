// Arguments of the ops as plain pointers and sizes. No torch header.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace kd {

// A number, or a tensor of one value (stride 0) or one value a row (stride 1).
template <class Real>
struct Parameter {
  double value = 0;
  const Real* data = nullptr;
  int64_t stride = 0;
  KD_INLINE Real at(int64_t row) const {
    return data ? data[row * stride] : static_cast<Real>(value);
  }
};

// N rows of logits or of their gradient; strides in elements, columns contiguous.
struct Matrix {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;
  int64_t columns = 0;
  KD_INLINE char* row(int64_t i) const { return data + i * stride * size_of(dtype); }
};

// Rows a thread should take at least: a task of less than about 10 µs costs more to hand out than
// to run. A row costs about as much as 400 columns before its first column.
inline int64_t grain(int64_t vocab) { return 16384 / (vocab + 400) + 1; }

}  // namespace kd
