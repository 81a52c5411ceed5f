// Similarity losses between rows and keys, a block of rows at a time: what the kernels take. No
// torch header.
#pragma once

#include <cstdint>

#include "../inline.h"

namespace kd::similarity {

// How a score φ comes from the product x = a·b of a row and a key, γ and T: see
// kdkernels/ops/similarity_loss/__init__.py.
enum class Kernel { dot, rbf, pkt, student_t, rbf_softmax };

constexpr const char* kernel_names[] = {"dot", "rbf", "pkt", "student_t", "rbf_softmax"};

// Whether the score is one of ‖a − b‖² = ‖a‖² + ‖b‖² − 2a·b.
KD_INLINE bool is_distance(Kernel kernel) { return kernel != Kernel::dot && kernel != Kernel::pkt; }
// Whether ∂φ/∂x is the same for all pairs: `slope` below.
KD_INLINE bool is_linear(Kernel kernel) { return kernel == Kernel::dot || kernel == Kernel::rbf; }

template <class Real>
struct Scores {
  Kernel kernel;
  Real gamma, temperature;
  const Real* squares;  // ‖b‖² of the keys, where is_distance
  KD_INLINE Real slope() const { return (kernel == Kernel::rbf ? 2 : 1) * gamma / temperature; }
};

// What one row adds to sums over all pairs.
struct RowSums {
  double v = 0;                       // Σ ∂L/∂x, 0 of a linear kernel
  double gamma = 0, temperature = 0;  // Σ ∂L/∂φ·∂φ/∂γ and its like
};

template <class Real>
struct Kernels {
  // Rows that a product takes at a time, columns of a panel of keys, and of a vector.
  int64_t rows, panel, lanes;

  // Panels of keys: key j's element d is at panels[j / panel][d][j % panel]; zeros behind the last.
  void (*pack)(const Real* keys, int64_t m, int64_t columns, int64_t first, int64_t last,
               Real* panels);
  // c (rows × columns) = or += Σ_k a(row, k)·b(k, column); rows and columns are multiples of
  // `rows` and `lanes`.
  void (*product)(const Real* a, int64_t row_stride, int64_t k_stride, const Real* b, int64_t ldb,
                  Real* c, int64_t ldc, int64_t rows, int64_t columns, int64_t k, bool accumulate);
  // Products to scores, in place. square: the row's ‖a‖².
  void (*scores)(const Scores<Real>&, Real square, Real* row, int64_t m);
  // ∂L/∂φ in v to ∂L/∂x (of linear kernels without the factor `slope`), from the row's products.
  RowSums (*differentiate)(const Scores<Real>&, Real square, const Real* products, Real* v,
                           int64_t m, bool parameters);
  // sums += each column's sum over rows; columns a multiple of lanes.
  void (*add_rows)(const Real* v, int64_t stride, int64_t rows, Real* sums, int64_t columns);
  // out = (x − y·by)·scale, a row.
  void (*finish)(const Real* x, const Real* y, Real by, Real scale, Real* out, int64_t n);
  Real (*square)(const Real* x, int64_t n);
};

template <class Real>
const Kernels<Real>& kernels();  // for this machine's CPU level

}  // namespace kd::similarity
