// The kernels of the RKD losses for one instruction set (KD_TARGET). Included by cpu_<level>.cpp,
// nowhere else.
//
// Distances come from differences of rows, never from a Gram matrix: two equal points are exactly 0
// apart, and near ones keep their digits. Cosines come from squared distances,
//
//     2·cos∠(i, j, k)·d(i, j)·d(k, j) = d²(i, j) + d²(k, j) − d²(i, k),
//
// a few operations a triplet, however wide the points are. The squares are double: the difference
// cancels where one arm is much shorter than the other.
#pragma once

#include <cmath>

#include "../rows.h"
#include "../scratch.h"
#include "problem.h"

namespace kd::rkd_loss {
namespace {

// Columns handled together: kRows rows of gradient and of points fill half a first-level cache.
constexpr int64_t kColumns = 256;

// out[k] += |x − y_k|² over n ≤ kColumns columns, for four rows y. Sum: what they add up in before
// they reach the double.
template <class Sum, class Real>
static KD_TARGET __attribute__((noinline)) void add_squares(const Real* x,
                                                            const Real* const (&y)[4], double* out,
                                                            int64_t n) {
  const Real *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  Sum s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < n; ++c) {
    Sum a = static_cast<Sum>(x[c]);
    Sum d0 = a - static_cast<Sum>(y0[c]), d1 = a - static_cast<Sum>(y1[c]);
    Sum d2 = a - static_cast<Sum>(y2[c]), d3 = a - static_cast<Sum>(y3[c]);
    s0 += d0 * d0;
    s1 += d1 * d1;
    s2 += d2 * d2;
    s3 += d3 * d3;
  }
  out[0] += static_cast<double>(s0);
  out[1] += static_cast<double>(s1);
  out[2] += static_cast<double>(s2);
  out[3] += static_cast<double>(s3);
}

// tile[i][j] = |x_{first + i} − x_{other + j}|².
template <class Sum, class Real>
void squares(const Points<Real>& x, int64_t first, int64_t rows, int64_t other, int64_t others,
             double (&tile)[kRows][kRows]) {
  for (auto& row : tile) {
    for (double& entry : row) entry = 0;
  }
  for (int64_t start = 0; start < x.columns; start += kColumns) {
    int64_t n = x.columns - start < kColumns ? x.columns - start : kColumns;
    for (int64_t j = 0; j < others; j += 4) {
      const Real* y[4];
      for (int64_t k = 0; k < 4; ++k) {
        y[k] = x.row(other + (j + k < others ? j + k : others - 1)) + start;
      }
      for (int64_t i = 0; i < rows; ++i) {
        add_squares<Sum>(x.row(first + i) + start, y, tile[i] + j, n);
      }
    }
  }
}

inline int64_t rows_of(int64_t block, int64_t n) {
  return n - block * kRows < kRows ? n - block * kRows : kRows;
}

// visit(i, j, |x_i − x_j|²) for the rows of a block and all j from its own block on, both ways.
template <class Sum, class Real, class Visit>
void pairs(const Points<Real>& x, int64_t n, int64_t block, Visit visit) {
  double tile[kRows][kRows];
  int64_t first = block * kRows, rows = rows_of(block, n);
  for (int64_t other = first; other < n; other += kRows) {
    int64_t others = rows_of(other / kRows, n);
    squares<Sum>(x, first, rows, other, others, tile);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < others; ++j) {
        visit(first + i, other + j, tile[i][j]);
        if (other != first) visit(other + j, first + i, tile[i][j]);
      }
    }
  }
}

template <class Visit>
void from_either_end(int64_t n, int64_t begin, int64_t end, Visit visit) {
  int64_t blocks = (n + kRows - 1) / kRows;
  for (int64_t b = begin; b < end; ++b) {
    visit(b);
    if (blocks - 1 - b != b) visit(blocks - 1 - b);
  }
}

// ---- the gradient of points from the derivatives by their pairs ----

// g += Σ_k w[k]·(x − y_k) over n columns, for four rows y.
KD_LOOP void pull(const Real* x, const Real* const (&y)[4], const Real (&w)[4], Real* g,
                  int64_t n) {
  const Real *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  Real w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    Real a = x[c];
    g[c] += (w0 * (a - y0[c]) + w1 * (a - y1[c])) + (w2 * (a - y2[c]) + w3 * (a - y3[c]));
  }
}

// gradient_i = Σ_j w_ij·(x_i − x_j) for the rows of a block; w: (kRows, padded n), 0 behind the
// end.
template <class Real>
void pull_block(const Points<Real>& x, int64_t n, int64_t block, const Real* w, int64_t padded,
                Real* gradient) {
  int64_t first = block * kRows, rows = rows_of(block, n);
  Real g[kRows][kColumns];
  for (int64_t start = 0; start < x.columns; start += kColumns) {
    int64_t columns = x.columns - start < kColumns ? x.columns - start : kColumns;
    for (auto& row : g) {
      for (Real& entry : row) entry = 0;
    }
    for (int64_t j = 0; j < n; j += 4) {
      const Real* y[4];
      for (int64_t k = 0; k < 4; ++k) y[k] = x.row(j + k < n ? j + k : n - 1) + start;
      for (int64_t i = 0; i < rows; ++i) {
        const Real* at = w + i * padded + j;
        pull<Real>(x.row(first + i) + start, y, {at[0], at[1], at[2], at[3]}, g[i], columns);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      memcpy(gradient + (first + i) * x.columns + start, g[i], columns * sizeof(Real));
    }
  }
}

inline int64_t padded(int64_t n) { return (n + 3) / 4 * 4; }

// ---- distances ----

template <class Real>
void distance_pairs(const Distances<Real>& p, int64_t begin, int64_t end) {
  from_either_end(p.n, begin, end, [&](int64_t block) {
    pairs<Real>(p.student, p.n, block, [&](int64_t i, int64_t j, double square) {
      p.student_distances[i * p.n + j] = static_cast<Real>(std::sqrt(square));
    });
    pairs<Real>(p.teacher, p.n, block, [&](int64_t i, int64_t j, double square) {
      p.teacher_distances[i * p.n + j] = static_cast<Real>(std::sqrt(square));
    });
  });
}

// The rows of a block: (kRows, n), kept or computed now.
template <class Real>
const Real* distances(const Points<Real>& x, const Real* kept, int64_t n, int64_t block,
                      Scratch<Real>& scratch) {
  int64_t first = block * kRows, rows = rows_of(block, n);
  if (kept != nullptr) return kept + first * n;
  Real* out = scratch.get(kRows * n);
  double tile[kRows][kRows];
  for (int64_t other = 0; other < n; other += kRows) {
    int64_t others = rows_of(other / kRows, n);
    squares<Real>(x, first, rows, other, others, tile);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < others; ++j) {
        out[i * n + other + j] = static_cast<Real>(std::sqrt(tile[i][j]));
      }
    }
  }
  return out;
}

KD_LOOP double sum_of_row(const Real* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(x[j]);
  return sum;
}

// Huber's ψ(e) = slope·(e − slope/2), slope = e clipped to [−1, 1]; NaN stays.
template <class Real>
KD_INLINE Real clipped(Real e) {
  e = e < -1 ? Real(-1) : e;
  return e > 1 ? Real(1) : e;
}

// Σψ and Σψ′·s of a row of distances.
KD_LOOP void add_losses(const Real* s, const Real* t, Real inverse_s, Real inverse_t, int64_t n,
                        double& loss, double& by_mean) {
  double sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
  for (int64_t j = 0; j < n; ++j) {
    Real e = s[j] * inverse_s - t[j] * inverse_t, slope = clipped(e);
    sum += static_cast<double>(slope * (e - slope / 2));
    moment += static_cast<double>(slope * s[j]);
  }
  loss = sum;
  by_mean = moment;
}

// The derivative by a distance over the distance; 0 where points coincide.
KD_LOOP void pair_weights(const Real* s, const Real* t, Real inverse_s, Real inverse_t, Real common,
                          Real scale, Real* w, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    Real slope = clipped(s[j] * inverse_s - t[j] * inverse_t);
    Real by_distance = scale * (slope * inverse_s - common);
    w[j] = s[j] == 0 ? Real(0) : by_distance / s[j];
  }
}

template <class Real, class Visit>
void over_blocks(const Distances<Real>& p, int64_t begin, int64_t end, Visit visit) {
  thread_local Scratch<Real> student, teacher;
  for (int64_t block = begin; block < end; ++block) {
    const Real* s = distances(p.student, p.student_distances, p.n, block, student);
    const Real* t = distances(p.teacher, p.teacher_distances, p.n, block, teacher);
    visit(block, s, t);
  }
}

template <class Real>
void distance_means(const Distances<Real>& p, int64_t begin, int64_t end) {
  over_blocks(p, begin, end, [&](int64_t block, const Real* s, const Real* t) {
    for (int64_t i = 0; i < rows_of(block, p.n); ++i) {
      p.sums[block * kRows + i] = sum_of_row(s + i * p.n, p.n);
      p.sums[p.n + block * kRows + i] = sum_of_row(t + i * p.n, p.n);
    }
  });
}

// 1/mean; where all points coincide the relative distances are 0.
template <class Real>
Real inverse_of(double mean) {
  return mean == 0 ? Real(0) : static_cast<Real>(1 / mean);
}

template <class Real>
void distance_losses(const Distances<Real>& p, int64_t begin, int64_t end) {
  Real inverse_s = inverse_of<Real>(p.means[0]), inverse_t = inverse_of<Real>(p.means[1]);
  over_blocks(p, begin, end, [&](int64_t block, const Real* s, const Real* t) {
    for (int64_t i = 0; i < rows_of(block, p.n); ++i) {
      int64_t row = block * kRows + i;
      add_losses(s + i * p.n, t + i * p.n, inverse_s, inverse_t, p.n, p.sums[2 * p.n + row],
                 p.sums[3 * p.n + row]);
    }
  });
}

template <class Real>
void distance_gradient(const Distances<Real>& p, int64_t begin, int64_t end) {
  Real inverse_s = inverse_of<Real>(p.means[0]), inverse_t = inverse_of<Real>(p.means[1]);
  Real common = static_cast<Real>(p.common);
  // Each pair is there twice.
  Real scale = static_cast<Real>(2 / (static_cast<double>(p.n) * static_cast<double>(p.n)));
  int64_t width = padded(p.n);
  thread_local Scratch<Real> scratch;
  Real* w = scratch.get(kRows * width);
  over_blocks(p, begin, end, [&](int64_t block, const Real* s, const Real* t) {
    for (int64_t i = 0; i < rows_of(block, p.n); ++i) {
      pair_weights(s + i * p.n, t + i * p.n, inverse_s, inverse_t, common, scale, w + i * width,
                   p.n);
      for (int64_t j = p.n; j < width; ++j) w[i * width + j] = 0;
    }
    pull_block(p.student, p.n, block, w, width, p.gradient);
  });
}

// ---- angles ----

template <class Real>
void angle_pairs(const Angles<Real>& p, int64_t begin, int64_t end) {
  auto keep = [&](double* squares, Real* inverses) {
    return [&p, squares, inverses](int64_t i, int64_t j, double square) {
      squares[i * p.n + j] = square;
      inverses[i * p.n + j] = static_cast<Real>(square == 0 ? 0 : 1 / std::sqrt(square));
    };
  };
  from_either_end(p.n, begin, end, [&](int64_t block) {
    pairs<double>(p.student, p.n, block, keep(p.student_squares, p.student_inverses));
    pairs<double>(p.teacher, p.n, block, keep(p.teacher_squares, p.teacher_inverses));
  });
}

// One arm (i, j) of the angles at j: row i and row j of one model.
template <class Real>
struct Arm {
  const double *own, *anchor;  // squares of rows i and j
  const Real* inverses;        // of row j
  double square;               // of the arm
  Real half;                   // ½/its length
};

// Over the other arms k: loss = Σψ; across[k] += ψ′/d(j, k); u = Σψ′/d(j, k), v = Σψ′·cos.
KD_LOOP void add_angles(const Arm<Real>& s, const Arm<Real>& t, Real inverse, Real* across, Real& u,
                        Real& v, double& loss, int64_t n) {
  const double *s_own = s.own, *s_anchor = s.anchor, *t_own = t.own, *t_anchor = t.anchor;
  const Real *s_inverses = s.inverses, *t_inverses = t.inverses;
  double s_square = s.square, t_square = t.square;
  Real s_half = s.half, t_half = t.half, total = 0, by_length = 0, by_cosine = 0;
#pragma omp simd reduction(+ : total, by_length, by_cosine)
  for (int64_t k = 0; k < n; ++k) {
    Real a = static_cast<Real>(s_square + (s_anchor[k] - s_own[k])) * (s_half * s_inverses[k]);
    Real b = static_cast<Real>(t_square + (t_anchor[k] - t_own[k])) * (t_half * t_inverses[k]);
    Real e = a - b, slope = clipped(e), pulled = slope * s_inverses[k];
    total += slope * (e - slope / 2);
    across[k] += pulled * inverse;
    by_length += pulled;
    by_cosine += slope * a;
  }
  u = by_length;
  v = by_cosine;
  loss += static_cast<double>(total);
}

template <class Real>
void angle_losses(const Angles<Real>& p, int64_t begin, int64_t end) {
  int64_t n = p.n;
  for (int64_t i = begin * kRows; i < (end * kRows < n ? end * kRows : n); ++i) {
    Real *arms = p.arms + i * n, *across = p.across + i * n;
    for (int64_t k = 0; k < n; ++k) across[k] = 0;
    double loss = 0;
    for (int64_t j = 0; j < n; ++j) {
      int64_t ij = i * n + j;
      Real inverse = p.student_inverses[ij], u, v;
      Arm<Real> s{p.student_squares + i * n, p.student_squares + j * n, p.student_inverses + j * n,
                  p.student_squares[ij], inverse / 2};
      Arm<Real> t{p.teacher_squares + i * n, p.teacher_squares + j * n, p.teacher_inverses + j * n,
                  p.teacher_squares[ij], p.teacher_inverses[ij] / 2};
      add_angles(s, t, inverse, across, u, v, loss, n);
      arms[j] = inverse * (u - inverse * v) / 2;
    }
    p.sums[i] = loss;
  }
}

// Both arms of an angle have the same derivative, and both orders of its ends the same angle.
KD_LOOP void angle_weights(const Real* arms, const Real* arms_across, int64_t stride,
                           const Real* across, Real scale, Real* w, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    w[j] = scale * (arms[j] + arms_across[j * stride] - across[j] / 2);
  }
}

template <class Real>
void angle_gradient(const Angles<Real>& p, int64_t begin, int64_t end) {
  double n = static_cast<double>(p.n);
  Real scale = static_cast<Real>(4 / (n * n * n));
  int64_t width = padded(p.n);
  thread_local Scratch<Real> scratch;
  Real* w = scratch.get(kRows * width);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t i = 0; i < rows_of(block, p.n); ++i) {
      int64_t row = block * kRows + i;
      angle_weights(p.arms + row * p.n, p.arms + row, p.n, p.across + row * p.n, scale,
                    w + i * width, p.n);
      for (int64_t j = p.n; j < width; ++j) w[i * width + j] = 0;
    }
    pull_block(p.student, p.n, block, w, width, p.gradient);
  }
}

}  // namespace

const Kernels KD_KERNELS = {
    distance_pairs<float>,    distance_pairs<double>,    distance_means<float>,
    distance_means<double>,   distance_losses<float>,    distance_losses<double>,
    distance_gradient<float>, distance_gradient<double>, angle_pairs<float>,
    angle_pairs<double>,      angle_losses<float>,       angle_losses<double>,
    angle_gradient<float>,    angle_gradient<double>,
};

}  // namespace kd::rkd_loss
