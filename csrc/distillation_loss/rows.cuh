// The kernel of distillation_loss: one template for every divergence, forward, one-pass and
// backward. Included by cuda_<divergences>.cu, nowhere else.
//
// Per row, whose share lies in shared memory (a row too long for that is fetched again, tile by
// tile, in every sweep):
//   1. maximum, then exponentials relative to it and their sums → log-sum-exps
//   2. p, q, log p, log q, the divergence's term → D, ΣG
//   3. if a gradient is wanted: (G − p·ΣG), label and z-loss terms → shared memory → one store
// Where ΣG = 0 is known 2 and 3 are one sweep. backward does 3 from the kept lines.
#pragma once

#include <type_traits>

#include "../blocks.cuh"
#include "binary.h"
#include "row_options.h"

namespace kd {

struct Call {
  Problem<float> problem;
  Plan plan;
  float* loss;
  Workspace* workspace;
  bool backward;
};

using Kernel = void (*)(Call);

#if defined(__CUDACC__)
namespace {

// log p = (x − anchor)·inverse_temperature − log_z; p = 2^((x − anchor)·c)·factor.
struct Softmax {
  float anchor, inverse_temperature, c, log_z, factor;
  __device__ __forceinline__ float log_probability(float x) const {
    return (x - anchor) * inverse_temperature - log_z;
  }
  __device__ __forceinline__ float exponential(float x) const {
    return exp2_hardware((x - anchor) * c);
  }
  __device__ void set(double z) {
    log_z = log_of_sum(z - 1);
    factor = 1 / static_cast<float>(z);
  }
  __device__ void restore(float kept_anchor, float kept_log_z) {
    anchor = kept_anchor;
    log_z = kept_log_z;
    factor = expf(-log_z);
  }
  __device__ static Softmax at(float temperature) {
    return {0, 1 / temperature, log2_e<float> / temperature, 0, 1};
  }
};

// A row's scalars. They lie in shared memory, are written by the team's first thread alone, and are
// read by each sweep as it begins: in registers they would be there in all of them.
struct Row {
  RowOptions<float> options;
  Weights<float> weights;
  Divergence effective;
  int label;  // a column, or −1
  bool excludes, reads_teacher, reads_unit, unit_is_student, stats_kd, stats_ce;
  float student_label, teacher_label;  // the logits there
  Softmax student, teacher, unit;      // unit: the student at temperature 1, every column
  float upstream, unit_lse, unit_scale, divergence, sum_g, odds_gradient;
  bool reads_mean, writes, is_empty;
};

struct Maxima {
  float student, teacher;
  __device__ void across(int width) {
    student = lanes_max(student, width);
    teacher = lanes_max(teacher, width);
  }
};

struct Exponentials {
  double student, teacher, unit;
  __device__ void across(int width) {
    student = lanes_sum(student, width);
    teacher = lanes_sum(teacher, width);
    unit = lanes_sum(unit, width);
  }
};

// Sums relative to maxima of their own.
struct Statistics {
  Maxima maxima;
  Exponentials sums;
  float student_c, teacher_c;
  __device__ static Statistics none() {
    return {{-infinity<float>(), -infinity<float>()}, {0, 0, 0}, 0, 0};
  }
  __device__ void across(int width) {
    Maxima own = maxima;
    maxima.across(width);
    sums.student *= rescale(own.student, maxima.student, student_c);
    sums.teacher *= rescale(own.teacher, maxima.teacher, teacher_c);
    if (sums.unit != 0) sums.unit *= rescale(own.student, maxima.student, log2_e<float>);
    sums.across(width);
  }
};

struct Sums {
  double phi, g, student_entropy, teacher_entropy, logits;
  int student_top, teacher_top;  // the first columns that hold the maxima
  __device__ static Sums none() { return {0, 0, 0, 0, 0, INT32_MAX, INT32_MAX}; }
  __device__ void across(int width) {
    phi = lanes_sum(phi, width);
    g = lanes_sum(g, width);
    student_entropy = lanes_sum(student_entropy, width);
    teacher_entropy = lanes_sum(teacher_entropy, width);
    logits = lanes_sum(logits, width);
    student_top = lanes_min(student_top, width);
    teacher_top = lanes_min(teacher_top, width);
  }
};

// A log-sum-exp, for Rényi's log B.
struct Geometric {
  float maximum;
  double sum;
  __device__ static Geometric none() { return {-infinity<float>(), 0}; }
  __device__ void across(int width) {
    float own = maximum;
    maximum = lanes_max(maximum, width);
    sum *= rescale(own, maximum, log2_e<float>);
    sum = lanes_sum(sum, width);
  }
};

struct Weight {
  double kd, ce;
  __device__ void across(int width) {
    kd = lanes_sum(kd, width);
    ce = lanes_sum(ce, width);
  }
};

template <class D>
constexpr bool has_ends = true;  // rows that `select` sends to a KL
template <>
constexpr bool has_ends<ForwardKL> = false;
template <>
constexpr bool has_ends<ReverseKL> = false;
template <>
constexpr bool has_ends<TotalVariation> = false;
template <>
constexpr bool has_ends<AlphaBeta> = false;

// The same object, of which the compiler knows nothing: it would compute addresses of twenty lines
// and a dozen options once for all rows, and hold them in registers through every sweep.
template <class T>
__device__ __forceinline__ const T& opaque(const T& x) {
  const T* at = &x;
  asm volatile("" : "+l"(at));
  return *at;
}

template <class D>
struct RowKernel : Share {
  const Call& call;
  const Problem<float>& p;
  Row& row;
  Area student_area, teacher_area, kept_student, kept_teacher;

  __device__ RowKernel(const Call& call, Team& team, Row& row, Memory memory)
      : Share(call.plan, team, call.problem.vocab), call(call), p(call.problem), row(row) {
    student_area = memory.raw(p.student, plan.tile);
    teacher_area = memory.raw(p.teacher, plan.tile);
    kept_student = memory.floats(plan.tile);
    kept_teacher = memory.floats(plan.tile);
  }

  // The label's column within a tile, or something far outside.
  __device__ int label_in(int tile) const {
    int64_t at = row.label - first_column(tile);
    return row.label >= 0 && at >= 0 && at < columns(tile) ? static_cast<int>(at) : -kSlot;
  }

  __device__ __forceinline__ void load_student(int slot, int excluded, float (&x)[kSlot]) const {
    load_slot(student_area, slot, p.student.dtype, x);
    replace(x, excluded - slot * kSlot, -infinity<float>());
  }
  __device__ __forceinline__ void load_teacher(int slot, int excluded, float (&x)[kSlot]) const {
    load_slot(teacher_area, slot, p.teacher.dtype, x);
    replace(x, excluded - slot * kSlot, -infinity<float>());
  }

  // A tile of both rows into shared memory.
  __device__ void stage(int tile) {
    team.sync();  // everyone has done with what lies there
    Piece student = piece(p.student, tile), teacher = piece(p.teacher, tile);
    bool reads_teacher = row.reads_teacher;
    fetch(team, student_area, student);
    if (reads_teacher) fetch(team, teacher_area, teacher);
    wait_for_copies();
    team.sync();
    straighten(team, student_area, student);
    if (reads_teacher) straighten(team, teacher_area, teacher);
  }

  __device__ void run(int64_t which, Divisors divisors) {
    i = which;
    if (team.thread == 0) begin(divisors);
    team.sync();
    bool wants_student = p.student_grad.data != nullptr;
    bool wants_teacher = p.teacher_grad.data != nullptr;
    if (!row.reads_teacher && !row.reads_unit) {
      if (wants_student) put_zeros(team, team.rank, team.blocks, p.student_grad, i, 0);
      if (wants_teacher) put_zeros(team, team.rank, team.blocks, p.teacher_grad, i, 0);
      return;
    }
    bool is_staged = false;
    if (!call.backward) {
      statistics();
      if (std::is_same_v<D, Renyi> && row.reads_teacher && row.effective == Divergence::renyi)
        log_b();
      is_staged = tiles() == 1;
    }
    // Terms, then gradient; where ΣG is known the first writes the gradient too.
    bool one_pass = wants_student && !wants_teacher;
    bool keeps_terms = plan.keeps && one_pass && !call.backward;
    for (int pass = call.backward; pass < 2; ++pass) {
      bool sums = pass == 0;
      if (sums && !row.reads_teacher && !row.reads_mean) {
        if (team.thread == 0) finish(Sums::none());
        team.sync();
        continue;
      }
      if (!sums && (row.writes || (!wants_student && !wants_teacher))) break;
      Sums all = sweep(sums, !is_staged, keeps_terms);
      if (!sums) break;
      is_staged = tiles() == 1;
      team.reduce(all);
      team.exchange(all);
      if (team.thread == 0) finish(all);
      team.sync();
    }
    if (wants_student) put_zeros(team, team.rank, team.blocks, p.student_grad, i, p.vocab);
    if (wants_teacher) put_zeros(team, team.rank, team.blocks, p.teacher_grad, i, p.vocab);
  }

  // ---- scalars: the first thread ----

  __device__ void begin(Divisors divisors) {
    const Problem<float>& p = opaque(this->p);
    int64_t label = p.labels ? p.labels[i] : -1;
    bool inside = label >= 0 && label < p.vocab;
    row.label = inside ? static_cast<int>(label) : -1;
    row.excludes = p.divergence == Divergence::dkd;
    row.upstream = 1;
    row.divergence = row.sum_g = row.odds_gradient = row.unit_lse = row.unit_scale = 0;
    row.writes = row.reads_mean = row.is_empty = row.stats_kd = row.stats_ce = false;
    RowOptions<float>& o = row.options;
    if (call.backward) {
      o = {p.line(kKdScale, i),
           p.line(kCeScale, i),
           p.line(kZScale, i),
           p.line(kTemperature, i),
           p.line(kTeacherTemperature, i),
           p.line(kFirst, i),
           p.line(kSecond, i)};
    } else {
      int mask = mask_of(p, i);
      o = row_options(p, i, mask, divisors);
      row.stats_kd = p.return_stats && (mask & kKdCounts);
      row.stats_ce = p.return_stats && (mask & kCeCounts);
    }
    row.weights = {o.first, o.second, 0.f};
    row.effective = select(p.divergence, o.first);
    row.student = Softmax::at(o.temperature);
    row.teacher = Softmax::at(o.teacher_temperature);
    row.unit = Softmax::at(1);
    row.unit_is_student = o.temperature == 1 && !row.excludes;
    row.reads_teacher = o.kd_scale != 0 || row.stats_kd;
    row.reads_unit = o.ce_scale != 0 || o.z_scale != 0 || row.stats_ce;
    row.student_label = row.teacher_label = not_a_number<float>();
    if (row.label >= 0 && (row.reads_unit || (row.excludes && row.reads_teacher))) {
      row.student_label = load_one(p.student.row(i), p.student.dtype, label);
    }
    if (row.label >= 0 && row.excludes && row.reads_teacher) {
      row.teacher_label = load_one(p.teacher.row(i), p.teacher.dtype, label);
    }
    if (call.backward) {
      if (row.reads_teacher || row.reads_unit) restore();
    } else {
      row.reads_mean = (o.ce_scale != 0 || row.stats_ce) && p.label_smoothing != 0;
      if (!row.reads_teacher && !row.reads_unit && team.rank == 0) {
        write_lines();
        p.totals[i] = 0;
        if (p.return_stats) {
          for (int which = kLines; which < kLinesWithStats; ++which) p.line(which, i) = 0;
        }
      }
    }
  }

  // What forward left for backward.
  __device__ void restore() {
    const Problem<float>& p = opaque(this->p);
    row.upstream = p.upstream[i * p.upstream_stride];
    row.student.restore(p.line(kStudentMax, i), p.line(kStudentLogZ, i));
    row.teacher.restore(p.line(kTeacherMax, i), p.line(kTeacherLogZ, i));
    float anchor = row.student.anchor;
    if (row.excludes) {  // only then does the maximum leave a column out
      float excluded = row.student_label;
      bool rest_is_empty = row.student.log_z == -infinity<float>();  // its anchor is a mere 0
      anchor = excluded > anchor || rest_is_empty ? excluded : anchor;
    }
    row.unit.restore(anchor, p.line(kUnitLogZ, i));
    row.unit_lse = row.unit.anchor + row.unit.log_z;
    row.unit_scale = row.options.ce_scale + times(2 * row.options.z_scale, row.unit_lse);
    row.divergence = p.line(kDivergence, i);
    row.sum_g = p.line(kSumG, i);
    if (row.effective == Divergence::renyi) {
      row.weights.log_b = row.sum_g;
      row.sum_g = -1;
    }
    if (row.excludes && row.reads_teacher) row.odds_gradient = label_and_rest().odds_gradient;
  }

  __device__ Binary<float> label_and_rest() const {
    return Binary<float>(row.student.log_probability(row.student_label),
                         row.teacher.log_probability(row.teacher_label));
  }

  __device__ void write_lines() const {
    const Problem<float>& p = opaque(this->p);
    const RowOptions<float>& o = row.options;
    const float values[kLines] = {
        row.student.anchor,
        row.student.log_z,
        row.teacher.anchor,
        row.teacher.log_z,
        row.divergence,
        row.effective == Divergence::renyi ? row.weights.log_b : row.sum_g,
        row.unit.log_z,
        o.kd_scale,
        o.ce_scale,
        o.z_scale,
        o.temperature,
        o.teacher_temperature,
        o.first,
        o.second};
#pragma unroll
    for (int which = 0; which < kLines; ++which) p.line(which, i) = values[which];
  }

  // After step 1: the log-sum-exps, from the sums of all blocks and the maxima of this one.
  __device__ void set_softmaxes(const Statistics& all, const Maxima& own) {
    double unit_sum = all.sums.unit;
    row.student.anchor = anchored(all.maxima.student);
    if (row.reads_teacher || row.unit_is_student) row.student.set(all.sums.student);
    if (row.reads_teacher) {
      row.teacher.anchor = anchored(all.maxima.teacher);
      row.teacher.set(all.sums.teacher);
    }
    row.is_empty = row.excludes && row.student.log_z == -infinity<float>() &&
                   row.teacher.log_z == -infinity<float>();
    // Nothing but the label has mass: there is nothing to distil.
    if (row.is_empty) row.options.kd_scale = 0;
    if (row.reads_unit && row.unit_is_student) {
      row.unit = row.student;
    } else if (row.reads_unit) {
      row.unit.anchor = row.student.anchor;
      if (row.excludes && row.label >= 0) {
        float rest = all.maxima.student, both = fmaxf(rest, row.student_label);
        row.unit.anchor = anchored(both);
        unit_sum =
            unit_sum * rescale(rest, both, log2_e<float>) + row.unit.exponential(row.student_label);
        if (!row.reads_teacher) row.student.anchor = row.unit.anchor;  // for backward
      }
      row.unit.set(unit_sum);
    }
    if (row.reads_unit) row.unit_lse = row.unit.anchor + row.unit.log_z;
    row.unit_scale = row.options.ce_scale + times(2 * row.options.z_scale, row.unit_lse);
    // What the kept exponentials are to be multiplied by.
    if (plan.keeps) {
      row.student.factor *= rescale(own.student, all.maxima.student, row.student.c);
      row.teacher.factor *= rescale(own.teacher, all.maxima.teacher, row.teacher.c);
    }
    row.writes = p.student_grad.data && !p.teacher_grad.data && !row.excludes &&
                 row.effective == Divergence::forward_kl && row.options.kd_scale != 0;
  }

  // After step 2: D, ΣG and what the row leaves.
  __device__ void finish(Sums sums) {
    const Problem<float>& p = opaque(this->p);
    const RowOptions<float>& o = row.options;
    float kd = 0;
    if (row.reads_teacher && !row.is_empty) {
      row.divergence = kd = static_cast<float>(sums.phi < 0 ? 0 : sums.phi);
      // ΣG = 0 is known of forward KL.
      row.sum_g = row.effective == Divergence::forward_kl ? 0.f : static_cast<float>(sums.g);
      if (row.effective == Divergence::renyi) {
        float order = row.weights.first, log_b = row.weights.log_b;
        // Near B = 1 the digits are in alpha's Bregman sum, far from it in the log-sum-exp.
        float log_of_b = absolute(log_b) < 0.5f ? log1pf(order * (order - 1) * kd) : log_b;
        row.divergence = kd = log_of_b / (order - 1);
        row.sum_g = -1;
      } else if (row.excludes) {
        Binary<float> binary = label_and_rest();
        row.sum_g = o.first * (binary.student_label - binary.teacher_label);
        row.odds_gradient = binary.odds_gradient;
        kd = times(o.first, binary.kl) + times(o.second, row.divergence);
      }
    }
    if (team.rank != 0) return;
    float ce = 0, label_log_prob = 0;
    if (o.ce_scale != 0 || row.stats_ce) {
      float smoothing = static_cast<float>(p.label_smoothing);
      label_log_prob = row.student_label - row.unit.anchor - row.unit.log_z;
      ce = (1 - smoothing) * -label_log_prob;
      if (row.excludes) sums.logits += row.student_label - row.unit.anchor;
      float mean = static_cast<float>(sums.logits / static_cast<double>(p.vocab));
      if (smoothing != 0) ce += smoothing * (row.unit.log_z - mean);
    }
    write_lines();
    float total = times(o.kd_scale, kd) + times(o.ce_scale, ce) +
                  times(o.z_scale, row.unit_lse * row.unit_lse);
    p.totals[i] = total;
    if (!p.return_stats) return;
    float entropy[2] = {static_cast<float>(sums.student_entropy),
                        static_cast<float>(sums.teacher_entropy)};
    if (row.excludes) {
      float odds[2] = {row.student.log_probability(row.student_label),
                       row.teacher.log_probability(row.teacher_label)};
#pragma unroll 1
      for (int k = 0; k < 2; ++k) entropy[k] = whole_entropy(odds[k], entropy[k]);
      if (row.student_label == top(row.student, row.student_label)) {
        sums.student_top = min(sums.student_top, row.label);
      }
      if (row.teacher_label == top(row.teacher, row.teacher_label)) {
        sums.teacher_top = min(sums.teacher_top, row.label);
      }
    }
    float t2 = p.t_squared ? o.temperature * o.temperature : 1.f;
    bool agrees = sums.student_top == sums.teacher_top;
    p.line(kKd, i) = row.stats_kd ? kd * t2 : 0.f;
    p.line(kCe, i) = row.stats_ce ? ce : 0.f;
    p.line(kStudentEntropy, i) = row.stats_kd ? entropy[0] : 0.f;
    p.line(kTeacherEntropy, i) = row.stats_kd ? entropy[1] : 0.f;
    p.line(kLabelLogProb, i) = row.stats_ce ? label_log_prob : 0.f;
    p.line(kAgreement, i) = row.stats_kd && agrees ? 1.f : 0.f;
  }

  // The largest logit of a whole row, the excluded label's included.
  __device__ float top(const Softmax& rest, float label) const {
    return row.excludes ? fmaxf(rest.log_z == -infinity<float>() ? label : rest.anchor, label)
                        : rest.anchor;
  }

  // ---- sweeps ----

  // Step 1.
  __device__ void statistics() {
    const float inf = infinity<float>();
    Statistics all = Statistics::none();
    bool reads_teacher = row.reads_teacher;
    bool reads_softmax = reads_teacher || row.unit_is_student;
    bool reads_unit = row.reads_unit && !row.unit_is_student;
    all.student_c = row.student.c;
    all.teacher_c = row.teacher.c;
    for (int tile = 0; tile < tiles(); ++tile) {
      stage(tile);
      int excluded = row.excludes ? label_in(tile) : -kSlot;
      Maxima before = all.maxima, here{-inf, -inf};
      for_slots(tile, [&](int slot) {
        float x[kSlot];
        load_student(slot, excluded, x);
        here.student = fmaxf(here.student, largest(x));
        if (!reads_teacher) return;
        load_teacher(slot, excluded, x);
        here.teacher = fmaxf(here.teacher, largest(x));
      });
      team.reduce(here);
      all.maxima = {fmaxf(before.student, here.student), fmaxf(before.teacher, here.teacher)};
      if (tile > 0) {
        all.sums.student *= rescale(before.student, all.maxima.student, all.student_c);
        all.sums.teacher *= rescale(before.teacher, all.maxima.teacher, all.teacher_c);
        all.sums.unit *= rescale(before.student, all.maxima.student, log2_e<float>);
      }
      float anchor_s = anchored(all.maxima.student), anchor_t = anchored(all.maxima.teacher);
      float sum_s = 0, sum_t = 0, sum_u = 0;
      for_slots(tile, [&](int slot) {
        float x[kSlot], e[kSlot];
        load_student(slot, excluded, x);
        if (reads_softmax) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) e[j] = exp2_hardware((x[j] - anchor_s) * all.student_c);
          sum_s += total(e);
          if (plan.keeps) store_floats(kept_student, slot, e);
        }
        if (reads_unit) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) e[j] = exp2_hardware((x[j] - anchor_s) * log2_e<float>);
          sum_u += total(e);
        }
        if (!reads_teacher) return;
        load_teacher(slot, excluded, x);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) e[j] = exp2_hardware((x[j] - anchor_t) * all.teacher_c);
        sum_t += total(e);
        if (plan.keeps) store_floats(kept_teacher, slot, e);
      });
      all.sums.student += sum_s;
      all.sums.teacher += sum_t;
      all.sums.unit += sum_u;
    }
    team.reduce(all.sums);
    Maxima own = all.maxima;
    team.exchange(all);
    if (team.thread == 0) set_softmaxes(all, own);
    team.sync();
  }

  // Rényi's log Σ q^r p^(1−r).
  __device__ void log_b() {
    Geometric all = Geometric::none();
    const Softmax student = row.student, teacher = row.teacher;
    float order = row.weights.first;
    for (int tile = 0; tile < tiles(); ++tile) {
      if (tiles() > 1) stage(tile);
      float maximum = -infinity<float>(), sum = 0;
      // First their maximum, then the sum.
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        float anchor = anchored(maximum);
        for_slots(tile, [&](int slot) {
          float s[kSlot], t[kSlot];
          load_student(slot, -kSlot, s);
          load_teacher(slot, -kSlot, t);
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            s[j] = geometric(student.log_probability(s[j]), teacher.log_probability(t[j]), order);
          }
          if (which == 0) {
            maximum = fmaxf(maximum, largest(s));
          } else {
#pragma unroll
            for (int j = 0; j < kSlot; ++j) s[j] = exp2_hardware((s[j] - anchor) * log2_e<float>);
            sum += total(s);
          }
        });
        if (which == 0) {
          Maxima here{maximum, all.maximum};
          team.reduce(here);
          maximum = fmaxf(here.student, here.teacher);
        }
      }
      all.sum = all.sum * rescale(all.maximum, maximum, log2_e<float>) + sum;
      all.maximum = maximum;
    }
    team.reduce(all);
    team.exchange(all);
    if (team.thread == 0) {
      bool infinite = all.maximum == infinity<float>();
      row.weights.log_b = infinite ? all.maximum : anchored(all.maximum) + log_of_sum(all.sum - 1);
    }
    team.sync();
  }

  struct Terms {
    float g[kSlot], h[kSlot], phi_sum, g_sum;
  };

  template <class Which>
  __device__ __forceinline__ static void terms_as(const Softmax& student, const Softmax& teacher,
                                                  const Weights<float>& weights,
                                                  const float (&s)[kSlot], const float (&t)[kSlot],
                                                  const float (&p)[kSlot], const float (&q)[kSlot],
                                                  Terms& out) {
    out.phi_sum = out.g_sum = 0;
#pragma unroll
    for (int j = 0; j < kSlot; ++j) {
      float a = student.log_probability(s[j]), b = teacher.log_probability(t[j]);
      float e = Which::mixes ? expm1_nonpositive(-absolute(a - b)) : 0.f;
      Term<float> term = Which::term(a, b, p[j], q[j], e, weights);
      out.phi_sum += term.phi;
      out.g_sum += term.g;
      out.g[j] = term.g;
      out.h[j] = term.h;
    }
  }

  // p of a slot. Never fused into a difference of probabilities, which is 0 where they are equal.
  __device__ __forceinline__ static void probabilities(const Softmax& softmax, bool is_kept,
                                                       const Area& kept, int slot,
                                                       const float (&x)[kSlot], float (&p)[kSlot]) {
    if (is_kept) {
      load_floats(kept, slot, p);
    } else {
#pragma unroll
      for (int j = 0; j < kSlot; ++j) p[j] = softmax.exponential(x[j]);
    }
#pragma unroll
    for (int j = 0; j < kSlot; ++j) p[j] = __fmul_rn(p[j], softmax.factor);
  }

  // Steps 2 (`sums`) and 3. The first leaves p and G where the exponentials were, if `keeps_terms`.
  __device__ Sums sweep(bool sums, bool stages, bool keeps_terms) {
    Sums all = Sums::none();
    const Softmax student = row.student, teacher = row.teacher;
    const Weights<float> weights = row.weights;
    bool writes = !sums || row.writes, stats = sums && row.stats_kd;
    bool has_kd = sums ? row.reads_teacher : row.options.kd_scale != 0;
    bool has_terms = !sums && keeps_terms;
    // Step 1 keeps what is read here: nothing if only the whole row at temperature 1 counts.
    bool is_kept = plan.keeps && !call.backward && (row.reads_teacher || row.unit_is_student);
    for (int tile = 0; tile < tiles(); ++tile) {
      if (stages) stage(tile);
      int label = label_in(tile), excluded = row.excludes ? label : -kSlot, n = columns(tile);
      float phi = 0, g = 0, student_entropy = 0, teacher_entropy = 0, logits = 0;
      for_slots(tile, [&](int slot) {
        float s[kSlot], t[kSlot], p_[kSlot], q[kSlot];
        Terms terms;
        load_student(slot, excluded, s);
        if (sums && row.reads_mean) {
          float anchor = row.unit.anchor, here = 0;
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            int column = slot * kSlot + j;
            here += column < n && column != excluded ? s[j] - anchor : 0.f;
          }
          logits += here;
        }
        if (has_kd && has_terms) {
          load_floats(kept_student, slot, p_);
          load_floats(kept_teacher, slot, terms.g);
        } else {
          probabilities(student, is_kept, kept_student, slot, s, p_);
        }
        if (has_kd && !has_terms) {
          load_teacher(slot, excluded, t);
          probabilities(teacher, is_kept, kept_teacher, slot, t, q);
          if (stats) {
            float hs = 0, ht = 0;
            float student_top = top(student, row.student_label);
            float teacher_top = top(teacher, row.teacher_label);
            int first = static_cast<int>(first_column(tile)) + slot * kSlot;
#pragma unroll
            for (int j = 0; j < kSlot; ++j) {
              hs -= weighted(p_[j], student.log_probability(s[j]));
              ht -= weighted(q[j], teacher.log_probability(t[j]));
              bool here = slot * kSlot + j < n;
              if (here && s[j] == student_top) all.student_top = min(all.student_top, first + j);
              if (here && t[j] == teacher_top) all.teacher_top = min(all.teacher_top, first + j);
            }
            student_entropy += hs;
            teacher_entropy += ht;
          }
          if (has_ends<D> && row.effective == Divergence::forward_kl) {
            terms_as<ForwardKL>(student, teacher, weights, s, t, p_, q, terms);
          } else if (has_ends<D> && row.effective == Divergence::reverse_kl) {
            terms_as<ReverseKL>(student, teacher, weights, s, t, p_, q, terms);
          } else {
            terms_as<D>(student, teacher, weights, s, t, p_, q, terms);
          }
          phi += terms.phi_sum;
          g += terms.g_sum;
        }
        if (writes) {
          if (p.teacher_grad.data) teacher_slot(slot, label, q, terms.h);
          if (p.student_grad.data) student_slot(slot, label, s, p_, terms.g);
        } else if (keeps_terms && row.options.kd_scale != 0) {
          // (With statistics alone the gradient reads the exponentials that lie there.)
          store_floats(kept_student, slot, p_);
          store_floats(kept_teacher, slot, terms.g);
        }
      });
      all.phi += phi;
      all.g += g;
      all.student_entropy += student_entropy;
      all.teacher_entropy += teacher_entropy;
      all.logits += logits;
      if (!writes) continue;
      team.sync();
      if (p.student_grad.data) put(team, student_area, piece(p.student_grad, tile));
      if (p.teacher_grad.data) put(team, teacher_area, piece(p.teacher_grad, tile));
    }
    return all;
  }

  // The student's gradient of a slot, over the student's logits in shared memory.
  __device__ __forceinline__ void student_slot(int slot, int label, const float (&s)[kSlot],
                                               const float (&p_)[kSlot],
                                               const float (&g)[kSlot]) const {
    const RowOptions<float>& o = row.options;
    float upstream = row.upstream, scale = o.kd_scale * upstream * row.student.inverse_temperature;
    int at = label - slot * kSlot;
    bool has_kd = o.kd_scale != 0;
    float out[kSlot];
    float g_factor = row.excludes ? scale * o.second : scale, p_factor = -scale * row.sum_g;
#pragma unroll
    for (int j = 0; j < kSlot; ++j) out[j] = has_kd ? g[j] * g_factor + p_[j] * p_factor : 0.f;
    if (row.excludes) replace(out, at, has_kd ? -p_factor : 0.f);
    if (row.reads_unit) {
      float unit_factor = row.unit_scale * upstream, ce = o.ce_scale * upstream;
      float smoothing = static_cast<float>(p.label_smoothing);
      float uniform = ce * smoothing / static_cast<float>(p.vocab);
      if (row.unit_is_student) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) out[j] = p_[j] * unit_factor + (out[j] - uniform);
      } else {
        float x[kSlot], factor = row.unit.factor * unit_factor, anchor = row.unit.anchor;
#pragma unroll
        for (int j = 0; j < kSlot; ++j) x[j] = s[j];
        if (row.excludes) replace(x, at, row.student_label);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          out[j] = exp2_hardware((x[j] - anchor) * log2_e<float>) * factor + (out[j] - uniform);
        }
      }
      if (o.ce_scale != 0 && static_cast<unsigned>(at) < kSlot) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) out[j] -= j == at ? ce * (1 - smoothing) : 0.f;
      }
    }
    store_slot(student_area, slot, p.student.dtype, out);
  }

  // The teacher's, (H − q·ΣH)·scale, over the teacher's logits.
  __device__ __forceinline__ void teacher_slot(int slot, int label, const float (&q)[kSlot],
                                               const float (&h)[kSlot]) const {
    const RowOptions<float>& o = row.options;
    bool has_kd = o.kd_scale != 0;
    float scale = o.kd_scale * row.upstream * row.teacher.inverse_temperature;
    float factor = 1, sum_h = row.divergence - row.sum_g, at_label = 0;
    if (row.effective == Divergence::reverse_kl) {
      sum_h = 0;  // Σq − Σp
    } else if (row.effective == Divergence::ab) {
      sum_h = (o.first + o.second) * row.divergence - row.sum_g;
    } else if (row.effective == Divergence::renyi) {
      sum_h = o.first / (o.first - 1);
    } else if (row.excludes) {
      factor = o.second;
      at_label = o.first * row.odds_gradient;
      sum_h = factor * row.divergence + at_label;
    }
    float out[kSlot];
#pragma unroll
    for (int j = 0; j < kSlot; ++j) {
      out[j] = has_kd ? h[j] * (scale * factor) + q[j] * (-scale * sum_h) : 0.f;
    }
    if (row.excludes) replace(out, label - slot * kSlot, has_kd ? at_label * scale : 0.f);
    store_slot(teacher_area, slot, p.teacher.dtype, out);
  }
};

// The sums that batchmean and mean divide by, which every block finds for itself.
__device__ __forceinline__ Divisors normalisers(const Problem<float>& p, Team& team) {
  Weight sum{0, 0};
  if (divides(p) && !p.has_normalizer) {
    if (!p.labels && !p.token_weights) {
      sum.kd = static_cast<double>(p.n);
    } else {
      for (int64_t i = threadIdx.x; i < p.n; i += kThreads) {
        int mask = mask_of(p, i);
        double weight = weight_of(p, i);
        sum.kd += mask & kKdCounts ? weight : 0;
        sum.ce += mask & kCeCounts ? weight : 0;
      }
      team.reduce_block(sum);
    }
  }
  return divisors_of(p, sum.kd, sum.ce);
}

struct Loss {
  double sum;
  __device__ void across(int width) { sum = lanes_sum(sum, width); }
};

// The loss, by the last block to get here.
__device__ __forceinline__ void add_up(const Call& call, Team& team, bool* last) {
  if (call.loss == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(&call.workspace->ticket, 1) == gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  Loss loss{0};
  for (int64_t i = threadIdx.x; i < call.problem.n; i += kThreads) {
    loss.sum += __ldcg(call.problem.totals + i);
  }
  team.reduce_block(loss);
  if (threadIdx.x == 0) *call.loss = static_cast<float>(loss.sum);
}

template <class D>
__global__ void __launch_bounds__(kThreads, 3)
    distillation_rows(const __grid_constant__ Call call) {
  __shared__ Mailbox mailbox;
  __shared__ Row rows[kWarps];
  __shared__ bool last;
  static_assert(sizeof(mailbox) + sizeof(rows) + 64 <= kStaticShared, "what plans leave free");
  Team team(call.plan, &mailbox, call.workspace);
  int warp = call.plan.split == Split::warps ? threadIdx.x / 32 : 0;
  int bytes = call.plan.shared_bytes / (call.plan.split == Split::warps ? kWarps : 1);
  Divisors divisors{1, 1};
  if (!call.backward) divisors = normalisers(call.problem, team);
  RowKernel<D> kernel(call, team, rows[warp], Memory{warp * bytes});
  for (int64_t i = team.first_row; i < call.problem.n; i += team.stride) {
    kernel.run(i, divisors);
    team.sync();  // nobody is still reading what the next row overwrites
  }
  if (!call.backward) add_up(call, team, &last);
}

}  // namespace
#endif

}  // namespace kd
