// The kernels of similarity_loss for one instruction set (KD_TARGET, vectors of KD_VECTOR bytes,
// KD_ROWS rows at a time). Included by cpu_<level>.cpp, nowhere else.
//
// Products are our own: a row's bits must not depend on the rows beside it or on threads, which no
// library promises, and MKL is not everywhere. Measured beside torch.mm in the commit that brought
// them.
#pragma once

#include <cstring>

#include "../elementary.h"
#include "problem.h"

namespace kd::similarity {
namespace {

// Terms of a product added up in registers before they are added to the sum so far: as many sums
// as there are chunks, each short, which keeps the error of 65,536 terms small; and 256 rows of 128
// columns stay in the second-level cache.
constexpr int64_t kChunk = 256;

template <class Real>
struct Vector {
  typedef Real type __attribute__((vector_size(KD_VECTOR)));
  static constexpr int64_t lanes = KD_VECTOR / sizeof(Real);
};

constexpr int kRows = KD_ROWS, kVectors = 3;

// ROWS rows × VECTORS vectors of columns: with 8 × 3 the accumulators and one row of b take 27 of
// AVX-512's 32 registers, with 4 × 3 15 of 16.
template <int ROWS, int VECTORS, class Real>
KD_TARGET __attribute__((noinline)) void micro(const Real* a, int64_t row_stride, int64_t k_stride,
                                               const Real* b, int64_t ldb, Real* c, int64_t ldc,
                                               int64_t k, bool accumulate) {
  using V = typename Vector<Real>::type;
  constexpr int64_t lanes = Vector<Real>::lanes;
  V sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = V{};
  }
  for (int64_t i = 0; i < k; ++i) {
    V right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) memcpy(&right[v], b + v * lanes, sizeof(V));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Real left = a[r * row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += left * right[v];
    }
    a += k_stride;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      Real* out = c + r * ldc + v * lanes;
      V before{};
      if (accumulate) memcpy(&before, out, sizeof(V));
      before += sums[r][v];
      memcpy(out, &before, sizeof(V));
    }
  }
}

template <class Real>
void product(const Real* a, int64_t row_stride, int64_t k_stride, const Real* b, int64_t ldb,
             Real* c, int64_t ldc, int64_t rows, int64_t columns, int64_t k, bool accumulate) {
  constexpr int64_t lanes = Vector<Real>::lanes;
  for (int64_t from = 0; from < k; from += kChunk) {
    int64_t size = k - from < kChunk ? k - from : kChunk;
    for (int64_t column = 0; column < columns;) {
      int64_t left = (columns - column) / lanes;
      // Four vectors are two pairs: a lone one reads as many of a's elements for a third of the
      // work.
      int64_t take = left == 4 ? 2 : left < 3 ? left : 3;
      auto run = take == 3   ? micro<kRows, 3, Real>
                 : take == 2 ? micro<kRows, 2, Real>
                             : micro<kRows, 1, Real>;
      for (int64_t row = 0; row < rows; row += kRows) {
        run(a + row * row_stride + from * k_stride, row_stride, k_stride, b + from * ldb + column,
            ldb, c + row * ldc + column, ldc, size, accumulate || from > 0);
      }
      column += take * lanes;
    }
  }
}

template <class Real>
KD_TARGET void pack(const Real* keys, int64_t m, int64_t columns, int64_t first, int64_t last,
                    Real* panels) {
  constexpr int64_t width = kVectors * Vector<Real>::lanes;
  for (int64_t p = first; p < last; ++p) {
    Real* panel = panels + p * width * columns;
    for (int64_t j = 0; j < width; ++j) {
      const Real* key = keys + (p * width + j) * columns;
      if (p * width + j < m) {
        for (int64_t d = 0; d < columns; ++d) panel[d * width + j] = key[d];
      } else {
        for (int64_t d = 0; d < columns; ++d) panel[d * width + j] = 0;
      }
    }
  }
}

// The kernels' mathematics, for one pair: x = a·b, `square` ‖a‖², y ‖b‖².
template <class Real>
struct Pair {
  Real gamma, temperature, rate, inverse;  // rate: γ/T
  KD_INLINE explicit Pair(const Scores<Real>& s)
      : gamma(s.gamma),
        temperature(s.temperature),
        rate(s.gamma / s.temperature),
        inverse(1 / s.temperature) {}

  static KD_INLINE Real distance(Real square, Real y, Real x) {
    Real d = (square + y) - 2 * x;
    return d < 0 ? Real(0) : d;  // NaN stays
  }
  // (1 + cos)/2, not below rounding: log of it stays finite for opposite vectors.
  static KD_INLINE Real half(Real x) { return (1 + x) * Real(0.5); }
  static KD_INLINE Real least() { return std::numeric_limits<Real>::epsilon(); }

  // ‖a‖² is the same for all keys of a row, and the softmax does not see it.
  KD_INLINE Real rbf(Real x, Real y) const { return rate * (2 * x - y); }
  KD_INLINE Real dot(Real x) const { return rate * x; }
  KD_INLINE Real pkt(Real x) const {
    Real h = half(x);
    return rate * log(h < least() ? least() : h);
  }
  KD_INLINE Real pkt_slope(Real x) const {
    Real h = half(x);
    return h < least() ? Real(0) : rate / (2 * h);
  }
  KD_INLINE Real student_t(Real d) const { return -inverse * log(1 + gamma * d); }
  KD_INLINE Real rbf_softmax(Real d) const { return gamma * exp(-d * inverse); }
};

template <class Real>
KD_TARGET void scores(const Scores<Real>& s, Real square, Real* row, int64_t m) {
  const Pair<Real> pair(s);
  const Real* y = s.squares;
  switch (s.kernel) {
    case Kernel::dot:
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) row[j] = pair.dot(row[j]);
      break;
    case Kernel::rbf:
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) row[j] = pair.rbf(row[j], y[j]);
      break;
    case Kernel::pkt:
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) row[j] = pair.pkt(row[j]);
      break;
    case Kernel::student_t:
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) row[j] = pair.student_t(pair.distance(square, y[j], row[j]));
      break;
    case Kernel::rbf_softmax:
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        row[j] = pair.rbf_softmax(pair.distance(square, y[j], row[j]));
      }
      break;
  }
}

// slope(x, y) = ∂φ/∂x, by_gamma and by_temperature of a pair; w is ∂L/∂φ. Zero wins: a key that is
// left out has w = 0 and any product.
#define KD_DIFFERENTIATE(SLOPE, BY_GAMMA, BY_TEMPERATURE)                                    \
  if (parameters) {                                                                          \
    _Pragma("omp simd reduction(+ : sum_v, sum_gamma, sum_temperature)") for (int64_t j = 0; \
                                                                              j < m; ++j) {  \
      Real w = v[j], x = products[j], y = squares[j * step];                                 \
      Real d = pair.distance(square, y, x);                                                  \
      (void)d;                                                                               \
      v[j] = times(w, SLOPE);                                                                \
      sum_v += static_cast<double>(v[j]);                                                    \
      sum_gamma += static_cast<double>(times(w, BY_GAMMA));                                  \
      sum_temperature += static_cast<double>(times(w, BY_TEMPERATURE));                      \
    }                                                                                        \
  } else {                                                                                   \
    _Pragma("omp simd reduction(+ : sum_v)") for (int64_t j = 0; j < m; ++j) {               \
      Real w = v[j], x = products[j], y = squares[j * step];                                 \
      Real d = pair.distance(square, y, x);                                                  \
      (void)d;                                                                               \
      (void)x;                                                                               \
      v[j] = times(w, SLOPE);                                                                \
      sum_v += static_cast<double>(v[j]);                                                    \
    }                                                                                        \
  }                                                                                          \
  break;

template <class Real>
KD_TARGET RowSums differentiate(const Scores<Real>& s, Real square, const Real* products, Real* v,
                                int64_t m, bool parameters) {
  const Pair<Real> pair(s);
  const Real gamma = s.gamma, inverse = pair.inverse, minus = -pair.inverse;
  const Real nothing = 0;
  const Real* squares = s.squares != nullptr ? s.squares : &nothing;
  const int64_t step = s.squares != nullptr ? 1 : 0;
  double sum_v = 0, sum_gamma = 0, sum_temperature = 0;
  switch (s.kernel) {
    case Kernel::dot:
      KD_DIFFERENTIATE(Real(1), x * inverse, pair.dot(x) * minus)
    case Kernel::rbf:
      KD_DIFFERENTIATE(Real(1), -d * inverse, pair.rate * d * inverse)
    case Kernel::pkt:
      KD_DIFFERENTIATE(pair.pkt_slope(x), pair.pkt(x) / gamma, pair.pkt(x) * minus)
    case Kernel::student_t:
      KD_DIFFERENTIATE(2 * pair.rate / (1 + gamma * d), -d * inverse / (1 + gamma * d),
                       pair.student_t(d) * minus)
    case Kernel::rbf_softmax:
      KD_DIFFERENTIATE(2 * inverse * pair.rbf_softmax(d), exp(-d * inverse),
                       pair.rbf_softmax(d) * d * inverse * inverse)
  }
  return {is_linear(s.kernel) ? 0 : sum_v, sum_gamma, sum_temperature};
}

template <class Real>
KD_TARGET void add_rows(const Real* v, int64_t stride, int64_t rows, Real* sums, int64_t columns) {
  using V = typename Vector<Real>::type;
  for (int64_t j = 0; j < columns; j += Vector<Real>::lanes) {
    V sum{}, next;
    for (int64_t i = 0; i < rows; ++i) {
      memcpy(&next, v + i * stride + j, sizeof(V));
      sum += next;
    }
    memcpy(&next, sums + j, sizeof(V));
    next += sum;
    memcpy(sums + j, &next, sizeof(V));
  }
}

template <class Real>
KD_TARGET void finish(const Real* x, const Real* y, Real by, Real scale, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - y[i] * by) * scale;
}

template <class Real>
KD_TARGET Real square(const Real* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return static_cast<Real>(sum);
}

template <class Real>
constexpr Kernels<Real> table = {
    kRows,
    kVectors * Vector<Real>::lanes,
    Vector<Real>::lanes,
    pack<Real>,
    product<Real>,
    scores<Real>,
    differentiate<Real>,
    add_rows<Real>,
    finish<Real>,
    square<Real>,
};

}  // namespace

extern const Kernels<float> KD_FLOAT;
extern const Kernels<double> KD_DOUBLE;
const Kernels<float> KD_FLOAT = table<float>;
const Kernels<double> KD_DOUBLE = table<double>;

}  // namespace kd::similarity
