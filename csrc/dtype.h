// How logits are stored.
#pragma once

#include <cstdint>

#include "inline.h"

namespace kd {

enum class Dtype { float64, float32, bfloat16, float16 };

KD_INLINE int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace kd
