// The row kernels of distillation_loss for one instruction set (KD_TARGET). Included by
// cpu_<level>.cpp, nowhere else.
//
// forward, per row, with its exponentials and then its terms in a scratch that stays in the
// second-level cache:
//   1. read both rows block by block: maximum, exponentials relative to the block's maximum, their
//   sums   → log-sum-exps; the differences of the logits
//   2. for each block: p, q, d = log p − log q, the divergence's term → D, ΣG
//   3. if a gradient is wanted, for each block: (G − p·ΣG), label and z-loss terms, one store
// Divergences whose ΣG is known to be zero do 2 and 3 block by block together. backward does 2 and
// 3 from the kept lines.
#pragma once

#include <cmath>

#include "../first_touch.h"
#include "../rows.h"
#include "../scratch.h"
#include "binary.h"
#include "problem.h"

namespace kd {
namespace {

// A row's softmax as its maximum and log-sum-exp give it: log p = (x − anchor)·inverse_temperature
// − log_z.
template <class Real>
struct Softmax {
  Real anchor, inverse_temperature, log_z;
  KD_INLINE Real log_probability(Real x) const {
    return (x - anchor) * inverse_temperature - log_z;
  }
};

// ---- one block of terms ----

// What block_terms writes: φ and G where they are to be summed (G unless ΣG = 0 is known); p over
// es and G over et where the student's gradient comes later, H besides where the teacher's does, or
// G·scale where no sum is needed for it.
enum class Keep { sums, sums_and_gradient, sums_and_scaled_gradient, gradient, both_gradients };

template <class Real>
struct TermBuffers {
  Real *phi, *g, *h;  // a block each; g also holds G·scale, and h what the terms take as e
};

// What a block of terms reads besides the exponentials: the differences that `differences` left
// (x·scale + shift is log p − log q), or, for terms of both logarithms, the logits.
template <class Real>
struct TermInputs {
  const Real* x;
  Real scale, shift;
  const Real *s, *t;
  Softmax<Real> student, teacher;
};

// One block, from exponentials: e·factor is the probability.
template <class D, Keep keep, class Real>
KD_TARGET __attribute__((noinline)) void block_terms(TermInputs<Real> in, Real* es, Real* et,
                                                     TermBuffers<Real> out, int64_t n,
                                                     Real student_factor, Real teacher_factor,
                                                     Weights<Real> weights, Real scale) {
  constexpr bool sums = keep == Keep::sums || keep == Keep::sums_and_gradient ||
                        keep == Keep::sums_and_scaled_gradient;
  if (D::mixes) {
    // A loop of its own: with one chain of 130 cycles an iteration the scheduler is full of waiting
    // instructions (41 cycles per 16 floats in one loop).
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out.h[i] = expm1_nonpositive(-absolute(in.x[i] * in.scale + in.shift));
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real p = es[i] * student_factor, q = et[i] * teacher_factor;
    if (D::subtracts) {
      // Keeps the compiler from putting a product unrounded into p − q, which would then not be 0
      // where both rows are the same.
      p = absolute(p);
      q = absolute(q);
    }
    Real a = D::of_difference ? in.x[i] * in.scale + in.shift : in.student.log_probability(in.s[i]);
    Real b = D::of_difference ? Real(0) : in.teacher.log_probability(in.t[i]);
    Term<Real> term = D::term(a, b, p, q, D::mixes ? out.h[i] : Real(0), weights);
    if (sums) out.phi[i] = term.phi;
    if (keep == Keep::sums && !D::sum_g_is_zero) out.g[i] = term.g;
    if (keep == Keep::sums_and_scaled_gradient) out.g[i] = term.g * scale;
    if (keep == Keep::sums_and_gradient || keep == Keep::gradient || keep == Keep::both_gradients) {
      es[i] = p;
      et[i] = term.g;
    }
    if (keep == Keep::both_gradients) out.h[i] = term.h;
  }
}

template <class Real>
using BlockTerms = void (*)(TermInputs<Real>, Real*, Real*, TermBuffers<Real>, int64_t, Real, Real,
                            Weights<Real>, Real);

template <class Real>
struct Terms {
  BlockTerms<Real> block;
  bool of_difference;
  template <class D, Keep keep>
  static Terms of() {
    return {block_terms<D, keep, Real>, D::of_difference};
  }
};

template <Keep keep, class Real>
Terms<Real> terms_of(Divergence divergence, Real first) {
  switch (divergence) {
    case Divergence::forward_kl:
    case Divergence::dkd:
      return Terms<Real>::template of<ForwardKL, keep>();
    case Divergence::reverse_kl:
      return Terms<Real>::template of<ReverseKL, keep>();
    case Divergence::jeffreys:
      return Terms<Real>::template of<Jeffreys, keep>();
    case Divergence::jsd:
      return near_half(first) ? Terms<Real>::template of<JSDWith<true>, keep>()
                              : Terms<Real>::template of<JSD, keep>();
    case Divergence::skew_forward_kl:
      return Terms<Real>::template of<SkewForwardKL, keep>();
    case Divergence::skew_reverse_kl:
      return Terms<Real>::template of<SkewReverseKL, keep>();
    case Divergence::alpha:
      return Terms<Real>::template of<Alpha, keep>();
    case Divergence::tvd:
      return Terms<Real>::template of<TotalVariation, keep>();
    case Divergence::renyi:
      return Terms<Real>::template of<Renyi, keep>();
    case Divergence::ab:
      return Terms<Real>::template of<AlphaBeta, keep>();
  }
  return {};
}

// ---- loops that only distillation_loss needs ----

KD_LOOP double block_entropy(const Real* x, const Real* e, Softmax<Real> row, Real factor,
                             int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum -= static_cast<double>(weighted(e[i] * factor, row.log_probability(x[i])));
  }
  return sum;
}

// out·inverse_temperature + a constant is log p − log q. Where the rows are the same it is exactly
// 0: ratio, the student's temperature over the teacher's, is 1 then.
KD_LOOP void differences(const Real* s, const Real* t, Real anchor_s, Real anchor_t, Real ratio,
                         Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (s[i] - anchor_s) - ratio * (t[i] - anchor_t);
}

KD_LOOP void block_geometric(const Real* s, const Real* t, Softmax<Real> student,
                             Softmax<Real> teacher, Real order, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Real a = student.log_probability(s[i]), b = teacher.log_probability(t[i]);
    out[i] = geometric(a, b, order);
  }
}

// out = x·first + y·second.
KD_LOOP void combine(const Real* x, Real first, const Real* y, Real second, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * first + y[i] * second;
}

KD_LOOP void fill(Real* out, Real value, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// out += e^(x − anchor)·scale − uniform.
KD_LOOP void add_unit(const Real* x, Real anchor, Real scale, Real uniform, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = exp2_scaled(x[i] - anchor, log2_e<Real>) * scale + (out[i] - uniform);
  }
}

KD_LOOP void add_scaled(const Real* p, Real scale, Real uniform, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = p[i] * scale + (out[i] - uniform);
}

// Zero wins: a masked row's gradient stays 0 whatever the upstream factor is.
KD_LOOP void scaled_nonzero(const Real* x, Real factor, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] == 0 ? x[i] : x[i] * factor;
}

KD_LOOP void fill_row(const Matrix& matrix, int64_t row, int64_t from) {
  Real zeros[256];
  fill(zeros, Real(0), 256);
  char* data = matrix.row(row);
  for (int64_t start = from; start < matrix.columns; start += 256) {
    int64_t n = matrix.columns - start < 256 ? matrix.columns - start : 256;
    store(zeros, data, matrix.dtype, start, n);
  }
}

// ---- one row ----

template <class Real>
class RowKernel {
 public:
  explicit RowKernel(const Problem<Real>& problem)
      : p_(problem), blocks_((problem.vocab + kBlock - 1) / kBlock) {
    thread_local Scratch<Real> scratch;
    // An odd number of cache lines between the two rows of exponentials: at multiples of 4 KiB
    // their accesses would alias.
    int64_t padded = (p_.vocab + 15) / 16 * 16 + 16;
    Real* memory = scratch.get(3 * padded + 7 * kBlock + 6 * blocks_);
    auto take = [&memory](int64_t size) {
      Real* piece = memory;
      memory += size;
      return piece;
    };
    es_ = take(padded);
    et_ = take(padded);
    scratch_x_ = take(padded);
    buffer_s_ = take(kBlock);
    buffer_t_ = take(kBlock);
    buffer_unit_ = take(kBlock);
    phi_ = take(kBlock);
    h_ = take(kBlock);
    out_ = take(kBlock);
    out_teacher_ = take(kBlock);
    max_s_ = take(blocks_);
    sum_s_ = take(blocks_);
    max_t_ = take(blocks_);
    sum_t_ = take(blocks_);
    max_unit_ = take(blocks_);
    sum_unit_ = take(blocks_);
  }

  void forward(int64_t i) {
    begin(i);
    bool stats_kd = p_.return_stats && (p_.masks[i] & kKdCounts);
    bool stats_ce = p_.return_stats && (p_.masks[i] & kCeCounts);
    reads_teacher_ = kd_scale_ != 0 || stats_kd;
    reads_unit_ = ce_scale_ != 0 || z_scale_ != 0 || stats_ce;
    if (!reads_teacher_ && !reads_unit_) return masked(i);

    bool one_pass = p_.student_grad.data != nullptr && p_.teacher_grad.data == nullptr;
    // Where the student's gradient will lie, if nothing reads the logits under it again: a row less
    // in the cache.
    bool over_gradient = one_pass && of_difference_ && !p_.return_stats && p_.vocab % kLanes == 0 &&
                         output(0) != out_;
    x_ = over_gradient ? output(0) : scratch_x_;
    statistics();
    Real ce = 0, label_log_prob = 0, kd = 0;
    if (ce_scale_ != 0 || stats_ce) {
      label_log_prob = logit(full_student_, label_) - unit_.anchor - unit_.log_z;
      ce = (1 - smoothing_) * -label_log_prob;
      if (smoothing_ != 0) ce += smoothing_ * (unit_.log_z - mean_logit_);
    }
    Real unit_lse = reads_unit_ ? unit_.anchor + unit_.log_z : Real(0);
    unit_scale_ = ce_scale_ + times(2 * z_scale_, unit_lse);
    // Before anything is written: in place, the gradient lies over the logits.
    if (stats_kd) entropies();
    bool agrees = stats_kd && argmax(full_student_) == argmax(full_teacher_);
    if (reads_teacher_) kd = divergence(one_pass);
    if (one_pass && !written_) finish_row();
    if (one_pass) fill_row<Real>(p_.student_grad, i, p_.vocab);

    p_.line(kStudentMax, i) = student_.anchor;
    p_.line(kStudentLogZ, i) = student_.log_z;
    p_.line(kTeacherMax, i) = teacher_.anchor;
    p_.line(kTeacherLogZ, i) = teacher_.log_z;
    p_.line(kDivergence, i) = divergence_;
    p_.line(kSumG, i) = effective_ == Divergence::renyi ? weights_.log_b : sum_g_;
    p_.line(kUnitLogZ, i) = unit_.log_z;
    p_.totals[i] =
        times(kd_scale_, kd) + times(ce_scale_, ce) + times(z_scale_, unit_lse * unit_lse);
    if (p_.return_stats) {
      Real t2 = p_.t_squared ? temperature_ * temperature_ : Real(1);
      p_.line(kKd, i) = stats_kd ? kd * t2 : Real(0);
      p_.line(kCe, i) = stats_ce ? ce : Real(0);
      p_.line(kStudentEntropy, i) = stats_kd ? student_entropy_ : Real(0);
      p_.line(kTeacherEntropy, i) = stats_kd ? teacher_entropy_ : Real(0);
      p_.line(kLabelLogProb, i) = stats_ce ? label_log_prob : Real(0);
      p_.line(kAgreement, i) = agrees ? Real(1) : Real(0);
    }
    if (p_.teacher_grad.data != nullptr) backward(i);
  }

  // The wanted gradients from the lines that forward left.
  void backward(int64_t i) {
    begin(i);
    reads_teacher_ = kd_scale_ != 0;
    reads_unit_ = ce_scale_ != 0 || z_scale_ != 0;
    bool wants_student = p_.student_grad.data != nullptr;
    bool wants_teacher = p_.teacher_grad.data != nullptr;
    if (!reads_teacher_ && !reads_unit_) {
      if (wants_student) fill_row<Real>(p_.student_grad, i, 0);
      if (wants_teacher) fill_row<Real>(p_.teacher_grad, i, 0);
      return;
    }
    if (p_.upstream != nullptr) upstream_ = p_.upstream[i * p_.upstream_stride];
    student_.anchor = p_.line(kStudentMax, i);
    student_.log_z = p_.line(kStudentLogZ, i);
    teacher_.anchor = p_.line(kTeacherMax, i);
    teacher_.log_z = p_.line(kTeacherLogZ, i);
    unit_.anchor = student_.anchor;
    if (excludes_) {  // only then does the maximum leave a column out
      Real excluded = logit(full_student_, label_);
      bool rest_is_empty = student_.log_z == -infinity<Real>();  // its anchor is then a mere 0
      unit_.anchor = excluded > unit_.anchor || rest_is_empty ? excluded : unit_.anchor;
    }
    unit_.log_z = p_.line(kUnitLogZ, i);
    unit_scale_ = ce_scale_ + times(2 * z_scale_, unit_.anchor + unit_.log_z);
    divergence_ = p_.line(kDivergence, i);
    sum_g_ = p_.line(kSumG, i);
    if (effective_ == Divergence::renyi) {
      weights_.log_b = sum_g_;
      sum_g_ = -1;
    }
    // Before a block is stored: in place, the label's logit is then gone.
    bool reads_odds = wants_teacher && reads_teacher_ && excludes_;
    odds_gradient_ = reads_odds ? label_and_rest().odds_gradient : Real(0);
    Real student_factor = std::exp(-student_.log_z), teacher_factor = std::exp(-teacher_.log_z);
    auto terms = wants_teacher ? terms_of<Keep::both_gradients, Real>(effective_, weights_.first)
                               : terms_of<Keep::gradient, Real>(effective_, weights_.first);
    x_ = scratch_x_;
    TermBuffers<Real> buffers{nullptr, nullptr, h_};
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      int64_t n = block_size(start);
      Real p_factor = student_factor;
      if (reads_teacher_ || unit_is_student_) {
        const Real* s = load_padded(student_row_, start, columns(start), buffer_s_);
        exponentials(s, student_.anchor, student_c_, es_, n, ahead(p_.student, start));
        if (reads_teacher_) {
          const Real* t = load_padded(teacher_row_, start, columns(start), buffer_t_);
          exponentials(t, teacher_.anchor, teacher_c_, et_, n, ahead(p_.teacher, start));
          if (wants_teacher) scaled(et_, teacher_factor, out_teacher_, n);
          if (of_difference_) {
            differences(s, t, student_.anchor, teacher_.anchor, temperature_ratio_, x_, n);
          }
          TermInputs<Real> inputs = term_inputs(x_, student_.anchor, teacher_.anchor);
          inputs.s = s;
          inputs.t = t;
          terms.block(inputs, es_, et_, buffers, n, student_factor, teacher_factor, weights_,
                      Real(0));
          p_factor = 1;
        }
      }
      // Both gradients are in buffers before either is stored: in place, a store overwrites what
      // was to be read.
      if (wants_teacher) teacher_block(start, n);
      if (wants_student) student_block(start, n, es_, p_factor, et_);
      if (wants_teacher) {
        store(out_teacher_, gradient_row(p_.teacher_grad), p_.teacher_grad.dtype, start,
              columns(start));
      }
    }
    if (wants_student) fill_row<Real>(p_.student_grad, i, p_.vocab);
    if (wants_teacher) fill_row<Real>(p_.teacher_grad, i, p_.vocab);
  }

 private:
  void begin(int64_t i) {
    i_ = i;
    kd_scale_ = p_.line(kKdScale, i);
    ce_scale_ = p_.line(kCeScale, i);
    z_scale_ = p_.line(kZScale, i);
    temperature_ = p_.line(kTemperature, i);
    Real teacher_temperature = p_.line(kTeacherTemperature, i);
    weights_ = {p_.line(kFirst, i), p_.line(kSecond, i), Real(0)};
    effective_ = select(p_.divergence, weights_.first);
    of_difference_ = terms_of<Keep::sums, Real>(effective_, weights_.first).of_difference;
    temperature_ratio_ = temperature_ / teacher_temperature;
    label_ = p_.labels ? p_.labels[i] : -1;
    excludes_ = p_.divergence == Divergence::dkd;
    smoothing_ = static_cast<Real>(p_.label_smoothing);
    upstream_ = 1;
    student_ = {Real(0), 1 / temperature_, Real(0)};
    teacher_ = {Real(0), 1 / teacher_temperature, Real(0)};
    unit_ = {Real(0), Real(1), Real(0)};
    student_c_ = log2_e<Real> / temperature_;
    teacher_c_ = log2_e<Real> / teacher_temperature;
    int64_t skip = excludes_ ? label_ : -1;
    student_row_ = row_of(p_.student, i, skip);
    teacher_row_ = row_of(p_.teacher, i, skip);
    full_student_ = row_of(p_.student, i, -1);
    full_teacher_ = row_of(p_.teacher, i, -1);
    unit_is_student_ = temperature_ == 1 && !excludes_;
    divergence_ = sum_g_ = 0;
    written_ = false;
  }

  void masked(int64_t i) {
    for (int which = 0; which <= kUnitLogZ; ++which) {
      p_.line(which, i) = 0;
    }
    if (p_.return_stats) {
      for (int which = kLines; which < kLinesWithStats; ++which) p_.line(which, i) = 0;
    }
    p_.totals[i] = 0;
    if (p_.student_grad.data != nullptr) fill_row<Real>(p_.student_grad, i, 0);
    if (p_.teacher_grad.data != nullptr) fill_row<Real>(p_.teacher_grad, i, 0);
  }

  // Columns of the block that starts here, and what its loops run over: those and the padding.
  int64_t columns(int64_t start) const {
    return p_.vocab - start < kBlock ? p_.vocab - start : kBlock;
  }
  int64_t block_size(int64_t start) const {
    return (columns(start) + kLanes - 1) / kLanes * kLanes;
  }

  static Real logit(const Row& row, int64_t column) {
    Real value;
    return *load(row, column, 1, &value);
  }

  char* gradient_row(const Matrix& m) const { return m.row(i_); }

  // The block after the one that starts here, in this row or the next.
  Ahead ahead(const Matrix& m, int64_t start) const {
    int64_t size = size_of(m.dtype);
    if (start + kBlock < p_.vocab) return {m.row(i_) + (start + kBlock) * size, size};
    return i_ + 1 < p_.n ? Ahead{m.row(i_ + 1), size} : Ahead{};
  }

  // What e^(…) of a block is to be multiplied by, where it was taken relative to that block's
  // maximum.
  static Real rescale(Real block_maximum, Real anchor, Real c) {
    if (block_maximum == anchor) return 1;
    return block_maximum == -infinity<Real>() ? Real(0) : exp2_scaled(block_maximum - anchor, c);
  }

  // Anchor and log-sum-exp of a row from its blocks'.
  void reduce(const Real* maxima, const Real* sums, Real c, Softmax<Real>& row) const {
    row.anchor = anchored(blocks_ == 1 ? maxima[0] : maximum(maxima, blocks_));
    double z = 0;
    for (int64_t k = 0; k < blocks_; ++k) z += sums[k] * rescale(maxima[k], row.anchor, c);
    row.log_z = static_cast<Real>(std::log(z));
  }

  // Step 1.
  void statistics() {
    double sum = 0;  // of the logits
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      const Real* s = load_padded(student_row_, start, columns(start), buffer_s_);
      max_s_[k] = maximum(s, n);
      if (reads_teacher_ || unit_is_student_) {
        sum_s_[k] = exponentials(s, anchored(max_s_[k]), student_c_, es_ + start, n,
                                 ahead(p_.student, start));
      }
      const Real* unit = s;
      if (reads_unit_ && !unit_is_student_) {
        if (excludes_) unit = load_padded(full_student_, start, columns(start), buffer_unit_);
        max_unit_[k] = excludes_ ? maximum(unit, n) : max_s_[k];
        sum_unit_[k] = sum_of_exponentials(unit, anchored(max_unit_[k]), log2_e<Real>, n);
      }
      if (reads_unit_ && smoothing_ != 0) {
        Real anchor = anchored(unit_is_student_ ? max_s_[k] : max_unit_[k]);
        sum += total(unit, anchor, columns(start)) + static_cast<double>(columns(start)) * anchor;
      }
      if (reads_teacher_) {
        const Real* t = load_padded(teacher_row_, start, columns(start), buffer_t_);
        max_t_[k] = maximum(t, n);
        sum_t_[k] = exponentials(t, anchored(max_t_[k]), teacher_c_, et_ + start, n,
                                 ahead(p_.teacher, start));
        if (of_difference_) {
          differences(s, t, anchored(max_s_[k]), anchored(max_t_[k]), temperature_ratio_,
                      x_ + start, n);
        }
      }
    }
    if (reads_teacher_ || unit_is_student_) reduce(max_s_, sum_s_, student_c_, student_);
    if (reads_teacher_) reduce(max_t_, sum_t_, teacher_c_, teacher_);
    if (unit_is_student_) unit_ = student_;
    if (reads_unit_ && !unit_is_student_) {
      reduce(max_unit_, sum_unit_, log2_e<Real>, unit_);
      if (!reads_teacher_) student_.anchor = unit_.anchor;  // backward finds the anchor there
    }
    mean_logit_ = static_cast<Real>(sum / static_cast<double>(p_.vocab) - unit_.anchor);
  }

  // For differences taken from these anchors. Where the rows are the same the shift is exactly 0.
  TermInputs<Real> term_inputs(const Real* x, Real anchor_s, Real anchor_t) const {
    Real shift =
        ((anchor_s - student_.anchor) - temperature_ratio_ * (anchor_t - teacher_.anchor)) *
            student_.inverse_temperature -
        (student_.log_z - teacher_.log_z);
    return {x, student_.inverse_temperature, shift, nullptr, nullptr, student_, teacher_};
  }

  // Step 2, and step 3 with it where ΣG = 0 is known. Returns the KD term before T².
  Real divergence(bool one_pass) {
    if (excludes_ && student_.log_z == -infinity<Real>() && teacher_.log_z == -infinity<Real>()) {
      kd_scale_ = p_.line(kKdScale, i_) =
          0;  // nothing but the label has mass: there is nothing to distil
      return 0;
    }
    if (effective_ == Divergence::renyi) weights_.log_b = log_b();
    Real value = 0;
    if (excludes_) {
      Binary<Real> binary = label_and_rest();
      value = times(weights_.first, binary.kl);
      sum_g_ = weights_.first * (binary.student_label - binary.teacher_label);
    }
    // ΣG = 0 is known of forward KL: its gradient needs no sum over the row and is finished here.
    // (DKD's G has a factor.)
    written_ = one_pass && effective_ == Divergence::forward_kl && !excludes_ && kd_scale_ != 0;
    auto terms = written_   ? Terms<Real>::template of<ForwardKL, Keep::sums_and_scaled_gradient>()
                 : one_pass ? terms_of<Keep::sums_and_gradient, Real>(effective_, weights_.first)
                            : terms_of<Keep::sums, Real>(effective_, weights_.first);
    bool sum_g_is_zero = effective_ == Divergence::forward_kl;
    Real inverse_s = std::exp(-student_.log_z), inverse_t = std::exp(-teacher_.log_z);
    double sum_phi = 0, sum_g = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      TermBuffers<Real> buffers{phi_, written_ ? output(start) : out_, h_};
      Real student_factor = rescale(max_s_[k], student_.anchor, student_c_) * inverse_s;
      TermInputs<Real> inputs = term_inputs(x_ + start, anchored(max_s_[k]), anchored(max_t_[k]));
      if (!of_difference_) {
        inputs.s = load_padded(student_row_, start, columns(start), buffer_s_);
        inputs.t = load_padded(teacher_row_, start, columns(start), buffer_t_);
      }
      terms.block(inputs, es_ + start, et_ + start, buffers, n, student_factor,
                  rescale(max_t_[k], teacher_.anchor, teacher_c_) * inverse_t, weights_,
                  kd_scale_ * student_.inverse_temperature);
      sum_phi += sum_of(phi_, n);
      if (!sum_g_is_zero) sum_g += sum_of(one_pass ? et_ + start : out_, n);
      if (written_) finish_block(start, n, es_ + start, student_factor, buffers.g);
    }
    divergence_ = static_cast<Real>(sum_phi < 0 ? 0 : sum_phi);
    if (effective_ == Divergence::renyi) {
      Real order = weights_.first, log_b = weights_.log_b;
      // Near B = 1 the digits are in alpha's Bregman sum, far from it in the log-sum-exp.
      divergence_ =
          (absolute(log_b) < Real(0.5) ? std::log1p(order * (order - 1) * divergence_) : log_b) /
          (order - 1);
      sum_g_ = -1;
    } else if (!excludes_) {
      sum_g_ = static_cast<Real>(sum_g);
    }
    return excludes_ ? value + times(weights_.second, divergence_) : divergence_;
  }

  // Rényi's log Σ q^r p^(1−r).
  Real log_b() {
    Real m = -infinity<Real>();
    double sum = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      block_geometric(load_padded(student_row_, start, columns(start), buffer_s_),
                      load_padded(teacher_row_, start, columns(start), buffer_t_), student_,
                      teacher_, weights_.first, out_, n);
      Real block = maximum(out_, n), next = block > m ? block : m;
      if (next == infinity<Real>()) return next;
      double scaled = sum_of_exponentials(out_, anchored(next), log2_e<Real>, n);
      sum = (m == next ? sum : sum * std::exp(static_cast<double>(m) - anchored(next))) + scaled;
      m = next;
    }
    return static_cast<Real>(anchored(m) + std::log(sum));
  }

  Binary<Real> label_and_rest() const {
    return Binary<Real>(log_odds(full_student_, student_), log_odds(full_teacher_, teacher_));
  }

  // log(p_label/p_rest), for a softmax over the rest.
  Real log_odds(const Row& row, const Softmax<Real>& rest) const {
    return rest.log_probability(logit(row, label_));
  }

  // Entropies of both rows; for DKD of the whole rows, from the label's odds and the rest.
  void entropies() {
    student_entropy_ = entropy(student_row_, es_, max_s_, student_c_, student_, buffer_s_);
    teacher_entropy_ = entropy(teacher_row_, et_, max_t_, teacher_c_, teacher_, buffer_t_);
    if (!excludes_) return;
    student_entropy_ = whole_entropy(log_odds(full_student_, student_), student_entropy_);
    teacher_entropy_ = whole_entropy(log_odds(full_teacher_, teacher_), teacher_entropy_);
  }

  Real entropy(const Row& row, const Real* e, const Real* maxima, Real c,
               const Softmax<Real>& softmax, Real* buffer) const {
    double sum = 0;
    Real inverse_z = std::exp(-softmax.log_z);
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock, n = block_size(start);
      sum += block_entropy(load_padded(row, start, columns(start), buffer), e + start, softmax,
                           rescale(maxima[k], softmax.anchor, c) * inverse_z, n);
    }
    return static_cast<Real>(sum);
  }

  // The first column that holds the maximum.
  int64_t argmax(const Row& row) {
    Real best = -infinity<Real>();
    int64_t column = 0;
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      int64_t n = block_size(start);
      const Real* x = load_padded(row, start, columns(start), buffer_unit_);
      Real m = maximum(x, n);
      if (!(m > best)) continue;
      best = m;
      column = start;
      while (x[column - start] != m) ++column;
    }
    return column;
  }

  // Step 3 for a whole row, from p and G in the scratch.
  void finish_row() {
    Real inverse_z = std::exp(-student_.log_z);
    for (int64_t k = 0; k < blocks_; ++k) {
      int64_t start = k * kBlock;
      Real p_factor =
          reads_teacher_ ? Real(1) : rescale(max_s_[k], student_.anchor, student_c_) * inverse_z;
      student_block(start, block_size(start), es_ + start, p_factor, et_ + start);
    }
  }

  // Where a block of the student's gradient is put together: where it is to lie if that holds
  // Reals, and nothing of the logits under it is read again.
  Real* output(int64_t start) {
    bool in_place = p_.student_grad.dtype == kOwnDtype && ce_scale_ == 0 && z_scale_ == 0 &&
                    columns(start) % kLanes == 0;
    return in_place ? reinterpret_cast<Real*>(gradient_row(p_.student_grad)) + start : out_;
  }

  // Step 3 for one block: the student's gradient from p = e·p_factor and G, stored.
  void student_block(int64_t start, int64_t n, const Real* e, Real p_factor, const Real* g) {
    if (kd_scale_ != 0) {
      Real scale = kd_scale_ * upstream_ * student_.inverse_temperature;
      combine(g, excludes_ ? scale * weights_.second : scale, e, -scale * sum_g_ * p_factor, out_,
              n);
      bool has_label = label_ >= start && label_ < start + n;
      if (excludes_ && has_label) out_[label_ - start] = scale * sum_g_;
    } else {
      fill(out_, Real(0), n);
    }
    finish_block(start, n, e, p_factor, out_);
  }

  // The label and z-loss terms added to a block of the gradient, which is then stored.
  void finish_block(int64_t start, int64_t n, const Real* e, Real p_factor, Real* out) {
    if (ce_scale_ != 0 || z_scale_ != 0) {
      Real scale = unit_scale_ * upstream_, ce = ce_scale_ * upstream_;
      Real uniform = ce * smoothing_ / static_cast<Real>(p_.vocab);
      if (unit_is_student_) {
        add_scaled(e, scale * p_factor, uniform, out, n);
      } else {
        add_unit(load_padded(full_student_, start, columns(start), buffer_unit_), unit_.anchor,
                 static_cast<Real>(std::exp(-unit_.log_z)) * scale, uniform, out, n);
      }
      bool has_label = label_ >= start && label_ < start + n;
      if (ce_scale_ != 0 && has_label) out[label_ - start] -= ce * (1 - smoothing_);
    }
    char* row = gradient_row(p_.student_grad);
    if (reinterpret_cast<char*>(out) != row + start * size_of(p_.student_grad.dtype)) {
      store(out, row, p_.student_grad.dtype, start, columns(start));
    }
  }

  // The teacher's gradient of one block, (H − q·ΣH)·scale, from q in out_teacher_ and H in h_, into
  // out_teacher_.
  void teacher_block(int64_t start, int64_t n) {
    if (kd_scale_ == 0) return fill(out_teacher_, Real(0), n);
    Real scale = kd_scale_ * upstream_ * teacher_.inverse_temperature;
    Real factor = 1, sum_h = divergence_ - sum_g_, at_label = 0;
    if (effective_ == Divergence::reverse_kl) {
      sum_h = 0;  // Σq − Σp
    } else if (effective_ == Divergence::ab) {
      sum_h = (weights_.first + weights_.second) * divergence_ - sum_g_;
    } else if (effective_ == Divergence::renyi) {
      sum_h = weights_.first / (weights_.first - 1);
    } else if (excludes_) {
      factor = weights_.second;
      at_label = weights_.first * odds_gradient_;
      sum_h = factor * divergence_ + at_label;
    }
    combine(h_, scale * factor, out_teacher_, -scale * sum_h, out_teacher_, n);
    if (excludes_ && label_ >= start && label_ < start + n) {
      out_teacher_[label_ - start] = at_label * scale;
    }
  }

  static constexpr Dtype kOwnDtype = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;

  const Problem<Real>& p_;
  const int64_t blocks_;
  Real *es_, *et_;        // a row each: exponentials, then p and G
  Real *scratch_x_, *x_;  // a row: differences of the logits
  Real *buffer_s_, *buffer_t_, *buffer_unit_, *phi_, *h_, *out_, *out_teacher_;  // a block each
  Real *max_s_, *sum_s_, *max_t_, *sum_t_, *max_unit_, *sum_unit_;               // one a block
  int64_t i_ = 0, label_ = -1;
  Real kd_scale_ = 0, ce_scale_ = 0, z_scale_ = 0, unit_scale_ = 0, upstream_ = 1;
  Real temperature_ = 1, temperature_ratio_ = 1, student_c_ = 1, teacher_c_ = 1, smoothing_ = 0,
       mean_logit_ = 0;
  Real divergence_ = 0, sum_g_ = 0, odds_gradient_ = 0, student_entropy_ = 0, teacher_entropy_ = 0;
  Weights<Real> weights_{};
  Divergence effective_ = Divergence::forward_kl;
  Row student_row_{}, teacher_row_{}, full_student_{}, full_teacher_{};
  Softmax<Real> student_{}, teacher_{},
      unit_{};  // unit: the student at temperature 1, every column
  bool excludes_ = false, of_difference_ = false, reads_teacher_ = false, reads_unit_ = false;
  bool unit_is_student_ = false, written_ = false;
};

// Calls run(i) for the rows, whose gradients may be fresh memory.
template <class Real, class Run>
void rows_with_gradients(const Problem<Real>& problem, int64_t begin, int64_t end, Run run) {
  const Matrix &student = problem.student_grad, &teacher = problem.teacher_grad;
  bool in_place = student.data == problem.student.data;
  FirstTouch of_student(in_place ? Matrix{} : student, problem.n, begin, end);
  FirstTouch of_teacher(teacher, problem.n, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    of_student.before(student.row(i + 1));
    of_teacher.before(teacher.row(i + 1));
    run(i);
  }
}

template <class Real>
void forward_rows(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  rows_with_gradients(problem, begin, end, [&](int64_t i) { kernel.forward(i); });
}

template <class Real>
void backward_rows(const Problem<Real>& problem, int64_t begin, int64_t end) {
  RowKernel<Real> kernel(problem);
  rows_with_gradients(problem, begin, end, [&](int64_t i) { kernel.backward(i); });
}

// Rows times a factor each; in place, where `to` is `from`, those of factor 1 are left alone.
template <class Real>
void scale_rows(const Matrix& from, const Matrix& to, const Real* factor, int64_t stride,
                int64_t begin, int64_t end) {
  Real buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    Real by = factor[i * stride];
    if (by == 1 && to.data == from.data) continue;
    Row row = row_of(from, i, -1);
    for (int64_t start = 0; start < from.columns; start += kBlock) {
      int64_t n = from.columns - start < kBlock ? from.columns - start : kBlock;
      const Real* x = load(row, start, n, buffer);
      scaled_nonzero(x, by, buffer, n);
      store(buffer, to.row(i), to.dtype, start, n);
    }
  }
}

}  // namespace

extern const Kernels KD_KERNELS;
const Kernels KD_KERNELS = {
    forward_rows<float>,   forward_rows<double>, backward_rows<float>,
    backward_rows<double>, scale_rows<float>,    scale_rows<double>,
};

}  // namespace kd
