// The elementwise kernels of kl_div for one instruction set (KD_TARGET). Included by
// cpu_<level>.cpp, nowhere else.
//
// Elements are taken in logical order, a block at a time. What does not lie in memory that way, or
// is broadcast, is gathered into the block's buffer first.
#pragma once

#include "../rows.h"
#include "problem.h"

namespace kd::kl_div {
namespace {

// ---- loads ----

KD_LOOP void load_strided(const char* data, Dtype dtype, int64_t stride, Real* out, int64_t n) {
  switch (dtype) {
    case Dtype::float64:
      for (int64_t i = 0; i < n; ++i) {
        out[i] = static_cast<Real>(reinterpret_cast<const double*>(data)[i * stride]);
      }
      break;
    case Dtype::float32:
      for (int64_t i = 0; i < n; ++i) {
        out[i] = static_cast<Real>(reinterpret_cast<const float*>(data)[i * stride]);
      }
      break;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < n; ++i) {
        out[i] =
            static_cast<Real>(from_bfloat16(reinterpret_cast<const uint16_t*>(data)[i * stride]));
      }
      break;
    case Dtype::float16:
      for (int64_t i = 0; i < n; ++i) {
        out[i] =
            static_cast<Real>(from_float16(reinterpret_cast<const uint16_t*>(data)[i * stride]));
      }
      break;
  }
}

inline int64_t offset_of(const Operand& operand, const std::vector<int64_t>& sizes, int64_t row) {
  int64_t offset = 0;
  for (size_t d = sizes.size() - 1; d-- > 0;) {
    offset += row % sizes[d] * operand.strides[d];
    row /= sizes[d];
  }
  return offset;
}

// Elements start ≤ i < start + n as Real: the tensor itself where it lies so, else `buffer`.
template <class Real>
const Real* elements(const Operand& operand, const std::vector<int64_t>& sizes, int64_t start,
                     int64_t n, Real* buffer) {
  int64_t columns = sizes.back(), stride = operand.strides.back();
  int64_t row = start / columns, column = start % columns;
  for (int64_t done = 0; done < n; ++row, column = 0) {
    int64_t piece = n - done < columns - column ? n - done : columns - column;
    int64_t offset = offset_of(operand, sizes, row) + column * stride;
    const char* data = operand.data + offset * size_of(operand.dtype);
    if (stride == 1) {
      const Real* x = load(Row{data, operand.dtype, -1}, 0, piece, buffer + done);
      if (piece == n) return x;
      if (x != buffer + done) memcpy(buffer + done, x, piece * sizeof(Real));
    } else {
      load_strided(data, operand.dtype, stride, buffer + done, piece);
    }
    done += piece;
  }
  return buffer;
}

// ---- terms ----

// Zero probability contributes 0, whatever the input.
template <bool log_target, class Real>
KD_INLINE Real term(Real x, Real t) {
  return log_target ? times(exp(t), t - x) : times(t, log(t) - x);
}

template <bool log_target, class Real>
KD_TARGET __attribute__((noinline)) double sum_of_terms(const Real* x, const Real* t, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(term<log_target>(x[i], t[i]));
  return sum;
}

template <bool log_target, class Real>
KD_TARGET __attribute__((noinline)) void write_terms(const Real* x, const Real* t, Real* out,
                                                     int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = term<log_target>(x[i], t[i]);
}

template <bool log_target, class Real>
KD_TARGET __attribute__((noinline)) void input_gradient(const Real* t, const Real* g, Real* out,
                                                        int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = times(log_target ? exp(t[i]) : t[i], -g[i]);
}

// d/dt; 0 at zero probability, so that a softmax below it sees the limit 0·log 0 = 0 and not 0·∞.
template <bool log_target, class Real>
KD_TARGET __attribute__((noinline)) void target_gradient(const Real* x, const Real* t,
                                                         const Real* g, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real weight = log_target ? exp(t[i]) : t[i], log_t = log_target ? t[i] : log(t[i]);
    Real slope = g[i] * (log_t - x[i] + 1);
    out[i] = log_target ? times(weight, slope) : (weight == 0 ? Real(0) : slope);
  }
}

// ---- tasks ----

// block(start, n) for the blocks of tasks begin ≤ k < end, after_task(k) behind each task.
template <class Block, class AfterTask>
void over_blocks(const Problem& p, int64_t begin, int64_t end, Block block, AfterTask after_task) {
  for (int64_t k = begin; k < end; ++k) {
    int64_t last = (k + 1) * kTask < p.numel ? (k + 1) * kTask : p.numel;
    for (int64_t start = k * kTask; start < last; start += kBlock) {
      block(start, last - start < kBlock ? last - start : kBlock);
    }
    after_task(k);
  }
}

template <class Real>
void forward_tasks(const Problem& p, int64_t begin, int64_t end) {
  Real input[kBlock], target[kBlock], out[kBlock];
  double sum = 0;
  auto block = [&](int64_t start, int64_t n) {
    const Real* x = elements(p.input, p.sizes, start, n, input);
    const Real* t = elements(p.target, p.sizes, start, n, target);
    if (p.terms.data == nullptr) {
      sum += p.log_target ? sum_of_terms<true>(x, t, n) : sum_of_terms<false>(x, t, n);
    } else {
      (p.log_target ? write_terms<true, Real> : write_terms<false, Real>)(x, t, out, n);
      store(out, p.terms.data, p.terms.dtype, start, n);
    }
  };
  over_blocks(p, begin, end, block, [&](int64_t k) {
    if (p.sums != nullptr) p.sums[k] = sum;
    sum = 0;
  });
}

template <class Real>
void backward_tasks(const Problem& p, int64_t begin, int64_t end) {
  Real input[kBlock], target[kBlock], upstream[kBlock], out[kBlock];
  auto block = [&](int64_t start, int64_t n) {
    const Real* t = elements(p.target, p.sizes, start, n, target);
    const Real* g = elements(p.upstream, p.sizes, start, n, upstream);
    if (p.input_grad.data != nullptr) {
      (p.log_target ? input_gradient<true, Real> : input_gradient<false, Real>)(t, g, out, n);
      store(out, p.input_grad.data, p.input_grad.dtype, start, n);
    }
    if (p.target_grad.data != nullptr) {
      const Real* x = elements(p.input, p.sizes, start, n, input);
      (p.log_target ? target_gradient<true, Real> : target_gradient<false, Real>)(x, t, g, out, n);
      store(out, p.target_grad.data, p.target_grad.dtype, start, n);
    }
  };
  over_blocks(p, begin, end, block, [](int64_t) {});
}

}  // namespace

const Kernels KD_KERNELS = {
    forward_tasks<float>,
    forward_tasks<double>,
    backward_tasks<float>,
    backward_tasks<double>,
};

}  // namespace kd::kl_div
