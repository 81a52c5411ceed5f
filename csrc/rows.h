// Loops over blocks of one row that know nothing about losses. Included once per instruction set,
// with KD_TARGET defined.
#pragma once

#include "arguments.h"
#include "elementary.h"

#if !defined(KD_TARGET)
#error "define KD_TARGET (see cpu_level.h) before including rows.h"
#endif

namespace kd {

// One row of logits as it lies in memory. `skip` is a column to be read as −inf, or −1.
struct Row {
  const char* data;
  Dtype dtype;
  int64_t skip;
};

static inline Row row_of(const Matrix& m, int64_t i, int64_t skip) {
  return {m.row(i), m.dtype, skip};
}

// Columns handled together: what two rows of a block occupy stays in a 32 KiB first-level cache,
// and starting the loops of a block costs little beside running them. (Of 1024, 2048 and 4096, the
// last two are equally fast with rows of 32,000; 4096 is 8 % slower with 128,256.)
constexpr int64_t kBlock = 2048;

// A static template has internal linkage: what is compiled for one instruction set stays in its
// file.
#define KD_LOOP         \
  template <class Real> \
  static KD_TARGET __attribute__((noinline))

KD_LOOP void convert(const float* x, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(x[i]);
}
KD_LOOP void convert(const double* x, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(x[i]);
}
KD_LOOP void convert_bfloat16(const uint16_t* x, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(from_bfloat16(x[i]));
}
KD_LOOP void convert_float16(const uint16_t* x, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(from_float16(x[i]));
}

KD_INLINE const float* same_type(const Row& row, int64_t start, float) {
  return row.dtype == Dtype::float32 ? reinterpret_cast<const float*>(row.data) + start : nullptr;
}
KD_INLINE const double* same_type(const Row& row, int64_t start, double) {
  return row.dtype == Dtype::float64 ? reinterpret_cast<const double*>(row.data) + start : nullptr;
}

// n columns from `start` as Real: the row itself where it already is of that type, else converted
// into `buffer`.
KD_LOOP const Real* load(const Row& row, int64_t start, int64_t n, Real* buffer) {
  const Real* direct = same_type(row, start, Real());
  bool skips = row.skip >= start && row.skip < start + n;
  if (direct != nullptr && !skips) return direct;
  switch (row.dtype) {
    case Dtype::float64:
      convert(reinterpret_cast<const double*>(row.data) + start, buffer, n);
      break;
    case Dtype::float32:
      convert(reinterpret_cast<const float*>(row.data) + start, buffer, n);
      break;
    case Dtype::bfloat16:
      convert_bfloat16(reinterpret_cast<const uint16_t*>(row.data) + start, buffer, n);
      break;
    case Dtype::float16:
      convert_float16(reinterpret_cast<const uint16_t*>(row.data) + start, buffer, n);
      break;
  }
  if (skips) buffer[row.skip - start] = -infinity<Real>();
  return buffer;
}

// Loops over multiples of this many columns have no remainder: a remainder runs one column at a
// time, through branches, and takes longer than the rest of a row of 100.
constexpr int64_t kLanes = 16;

// The same with −inf behind the row's end, up to a multiple of kLanes: columns of probability 0,
// which add nothing anywhere.
KD_LOOP const Real* load_padded(const Row& row, int64_t start, int64_t n, Real* buffer) {
  const Real* x = load(row, start, n, buffer);
  if (n % kLanes == 0) return x;
  if (x != buffer) memcpy(buffer, x, n * sizeof(Real));
  for (int64_t i = n; i % kLanes != 0; ++i) buffer[i] = -infinity<Real>();
  return buffer;
}

KD_LOOP void store(const Real* x, char* data, Dtype dtype, int64_t start, int64_t n) {
  switch (dtype) {
    case Dtype::float64: {
      double* out = reinterpret_cast<double*>(data) + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(x[i]);
      break;
    }
    case Dtype::float32: {
      float* out = reinterpret_cast<float*>(data) + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(x[i]);
      break;
    }
    case Dtype::bfloat16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(data) + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(static_cast<float>(x[i]));
      break;
    }
    case Dtype::float16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(data) + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = to_float16(static_cast<float>(x[i]));
      break;
    }
  }
}

// A fourth of n for loops that take four columns at a time; 0 for short rows, where starting such a
// loop costs more than it saves.
inline int64_t quarter_of(int64_t n) { return n < 512 ? 0 : n / (4 * kLanes) * kLanes; }

// Four maxima at a time: one alone waits for its own last result at every step (a sixth of a
// forward KL row's time).
KD_LOOP Real maximum(const Real* x, int64_t n) {
  int64_t quarter = quarter_of(n);
  const Real *x1 = x + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
  Real m = -infinity<Real>(), m1 = m, m2 = m, m3 = m;
#pragma omp simd reduction(max : m, m1, m2, m3)
  for (int64_t i = 0; i < quarter; ++i) {
    m = x[i] > m ? x[i] : m;
    m1 = x1[i] > m1 ? x1[i] : m1;
    m2 = x2[i] > m2 ? x2[i] : m2;
    m3 = x3[i] > m3 ? x3[i] : m3;
  }
#pragma omp simd reduction(max : m)
  for (int64_t i = 4 * quarter; i < n; ++i) m = x[i] > m ? x[i] : m;
  m = m1 > m ? m1 : m;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m ? m2 : m;
}

// Sums are taken in double, four terms at a time: in float a lane that holds one large term loses
// the many small ones after it (1.5e-6 of the log-sum-exp of 32,000 columns).
KD_LOOP double sum_of(const Real* x, int64_t n) {
  int64_t quarter = quarter_of(n);
  const Real *x1 = x + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < quarter; ++i)
    sum += static_cast<double>((x[i] + x1[i]) + (x2[i] + x3[i]));
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 4 * quarter; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

KD_LOOP void scaled(const Real* x, Real factor, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

KD_LOOP double total(const Real* x, Real anchor, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i] - anchor);
  return sum;
}

// What is read next: prefetched while exponentials are computed, `lines` cache lines for every 64
// columns, 0 for none. One core then reads memory at the speed it computes: forward KL takes 0.49
// ns per column instead of 0.73. (Asked for in one burst before the block, it changed nothing.)
struct Ahead {
  const char* data = nullptr;
  int64_t lines = 0;
};

// out[i] = 2^((x[i] − anchor)·c), returning their sum. The subtraction comes first: it is exact
// where it matters, while a rounded anchor·c would cost digits as soon as the logits carry an
// offset.
KD_LOOP double exponentials(const Real* x, Real anchor, Real c, Real* out, int64_t n, Ahead ahead) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t line = 0; line < ahead.lines; ++line) {
      __builtin_prefetch(ahead.data + line * 64, 0, 2);
    }
    ahead.data += ahead.lines * 64;
    const Real* from = x + i;
    Real* to = out + i;
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      Real e[4];
      for (int64_t k = 0; k < 4; ++k) {
        e[k] = exp2_scaled(from[j + k * kLanes] - anchor, c);
        to[j + k * kLanes] = e[k];
      }
      sums[j] += static_cast<double>((e[0] + e[1]) + (e[2] + e[3]));
    }
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < n; ++j) {
    out[j] = exp2_scaled(x[j] - anchor, c);
    sum += static_cast<double>(out[j]);
  }
  for (double lane : sums) sum += lane;
  return sum;
}

KD_LOOP double sum_of_exponentials(const Real* x, Real anchor, Real c, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(exp2_scaled(x[i] - anchor, c));
  return sum;
}

// What is subtracted from a row before its exponentials: its maximum, or 0 where every column is
// −inf, so that such a row becomes NaN by 0/0, as a softmax does.
template <class Real>
KD_INLINE Real anchored(Real maximum) {
  return maximum == -infinity<Real>() ? Real(0) : maximum;
}

}  // namespace kd
