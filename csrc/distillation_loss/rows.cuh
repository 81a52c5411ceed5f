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

// What a team's first thread finds out about a row.
struct Row {
  RowOptions<float> options;
  int mask;
  int label;  // a column, or −1
  bool bad_label;
  float student_label, teacher_label;  // the logits there
  // backward
  float upstream;
  float student_anchor, student_log_z, teacher_anchor, teacher_log_z;
  float divergence, sum_g, unit_log_z;
};

// log p = (x − anchor)·inverse_temperature − log_z; p = 2^((x − anchor)·c)·factor.
struct Softmax {
  float anchor = 0, inverse_temperature = 1, c = log2_e<float>, log_z = 0, factor = 1;
  __device__ __forceinline__ float log_probability(float x) const {
    return (x - anchor) * inverse_temperature - log_z;
  }
  __device__ __forceinline__ float exponential(float x) const {
    return exp2_hardware((x - anchor) * c);
  }
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

template <class D>
struct RowKernel : Share {
  const Call& call;
  const Problem<float>& p;
  Row* row;  // in shared memory
  Area student_area, teacher_area, kept_student, kept_teacher;

  float kd_scale, ce_scale, z_scale, unit_scale, divergence, sum_g, odds_gradient;
  Weights<float> weights;
  Divergence effective;
  Softmax student, teacher, unit;  // unit: the student at temperature 1, every column
  bool excludes, reads_teacher, reads_unit, unit_is_student, reads_student_softmax;

  __device__ RowKernel(const Call& call, Team& team, Row* row, Memory memory)
      : Share(call.plan, team, call.problem.vocab), call(call), p(call.problem), row(row) {
    student_area = memory.raw(p.student, plan.tile);
    teacher_area = memory.raw(p.teacher, plan.tile);
    kept_student = memory.floats(plan.tile);
    kept_teacher = memory.floats(plan.tile);
  }

  // The label's column within a tile, or something far outside.
  __device__ int label_in(int tile) const {
    int64_t at = row->label - first_column(tile);
    return row->label >= 0 && at >= 0 && at < columns(tile) ? static_cast<int>(at) : -kSlot;
  }
  __device__ int excluded_in(int tile) const { return excludes ? label_in(tile) : -kSlot; }

  __device__ __forceinline__ void load_student(int slot, int excluded, float (&x)[kSlot]) const {
    load_slot(student_area, slot, p.student.dtype, x);
    replace(x, excluded - slot * kSlot, -infinity<float>());
  }
  __device__ __forceinline__ void load_teacher(int slot, int excluded, float (&x)[kSlot]) const {
    load_slot(teacher_area, slot, p.teacher.dtype, x);
    replace(x, excluded - slot * kSlot, -infinity<float>());
  }

  // A tile of both rows into shared memory, unless it is the only one and there already.
  __device__ void stage(int tile, bool again) {
    if (again && tiles() == 1) return;
    if (again || tile > 0) team.sync();  // everyone has done with the tile that lies there
    fetch(team, student_area, piece(p.student, tile));
    if (reads_teacher) fetch(team, teacher_area, piece(p.teacher, tile));
    if (!again && tile == 0 && team.thread == 0 && row->label >= 0) {
      row->student_label = load_one(p.student.row(i), p.student.dtype, row->label);
      bool reads = excludes && reads_teacher;
      row->teacher_label = reads ? load_one(p.teacher.row(i), p.teacher.dtype, row->label) : 0.f;
    }
    wait_for_copies();
    team.sync();
    straighten(team, student_area, piece(p.student, tile));
    if (reads_teacher) straighten(team, teacher_area, piece(p.teacher, tile));
  }

  // ---- a row ----

  __device__ void begin(int64_t which, Divisors divisors) {
    i = which;
    if (team.thread == 0) {
      Row r{};
      int64_t label = p.labels ? p.labels[i] : -1;
      bool inside = label >= 0 && label < p.vocab;
      r.label = inside ? static_cast<int>(label) : -1;
      r.bad_label = p.labels && !inside && label != p.ignore_index;
      r.student_label = r.teacher_label = not_a_number<float>();
      r.upstream = 1;
      if (call.backward) {
        r.options = {p.line(kKdScale, i),     p.line(kCeScale, i),
                     p.line(kZScale, i),      p.line(kTemperature, i),
                     p.line(kTeacherTemperature, i), p.line(kFirst, i),
                     p.line(kSecond, i)};
        r.upstream = p.upstream[i * p.upstream_stride];
        r.student_anchor = p.line(kStudentMax, i);
        r.student_log_z = p.line(kStudentLogZ, i);
        r.teacher_anchor = p.line(kTeacherMax, i);
        r.teacher_log_z = p.line(kTeacherLogZ, i);
        r.divergence = p.line(kDivergence, i);
        r.sum_g = p.line(kSumG, i);
        r.unit_log_z = p.line(kUnitLogZ, i);
      } else {
        r.mask = mask_of(p, i);
        r.options = row_options(p, i, r.mask, divisors);
      }
      *row = r;
    }
    team.sync();
    const RowOptions<float>& o = row->options;
    kd_scale = o.kd_scale;
    ce_scale = o.ce_scale;
    z_scale = o.z_scale;
    weights = {o.first, o.second, 0.f};
    effective = select(p.divergence, weights.first);
    excludes = p.divergence == Divergence::dkd;
    student = teacher = unit = Softmax();
    student.inverse_temperature = 1 / o.temperature;
    student.c = log2_e<float> / o.temperature;
    teacher.inverse_temperature = 1 / o.teacher_temperature;
    teacher.c = log2_e<float> / o.teacher_temperature;
    unit_is_student = o.temperature == 1 && !excludes;
    divergence = sum_g = odds_gradient = 0;
    int mask = p.return_stats && !call.backward ? row->mask : 0;
    reads_teacher = kd_scale != 0 || (mask & kKdCounts);
    reads_unit = ce_scale != 0 || z_scale != 0 || (mask & kCeCounts);
    reads_student_softmax = reads_teacher || unit_is_student;
  }

  __device__ void masked() {
    if (p.student_grad.data) put_zeros(team, p.student_grad, i, 0);
    if (p.teacher_grad.data) put_zeros(team, p.teacher_grad, i, 0);
    if (call.backward || team.rank != 0 || team.thread != 0) return;
    for (int which = 0; which <= kUnitLogZ; ++which) p.line(which, i) = 0;
    if (p.return_stats) {
      for (int which = kLines; which < kLinesWithStats; ++which) p.line(which, i) = 0;
    }
    write_options();
    p.totals[i] = 0;
  }

  __device__ void write_options() const {
    const RowOptions<float>& o = row->options;
    p.line(kKdScale, i) = kd_scale;
    p.line(kCeScale, i) = ce_scale;
    p.line(kZScale, i) = z_scale;
    p.line(kTemperature, i) = o.temperature;
    p.line(kTeacherTemperature, i) = o.teacher_temperature;
    p.line(kFirst, i) = o.first;
    p.line(kSecond, i) = o.second;
  }

  __device__ void forward() {
    if (!reads_teacher && !reads_unit) return masked();
    bool stats_kd = p.return_stats && (row->mask & kKdCounts);
    bool stats_ce = p.return_stats && (row->mask & kCeCounts);
    statistics();
    float unit_lse = reads_unit ? unit.anchor + unit.log_z : 0.f;
    unit_scale = ce_scale + times(2 * z_scale, unit_lse);
    bool reads_mean = (ce_scale != 0 || stats_ce) && p.label_smoothing != 0;

    // Nothing but the label has mass: there is nothing to distil.
    bool empty = excludes && student.log_z == -infinity<float>() &&
                 teacher.log_z == -infinity<float>();
    if (empty) kd_scale = 0;
    if (reads_teacher && effective == Divergence::renyi) weights.log_b = log_b();
    bool one_pass = p.student_grad.data != nullptr && p.teacher_grad.data == nullptr;
    bool writes = one_pass && effective == Divergence::forward_kl && !excludes && kd_scale != 0;
    Sums sums = Sums::none();
    if (reads_teacher || reads_mean) {
      sums = term_sweep(stats_kd, reads_mean, writes, one_pass && kd_scale != 0);
    }
    float kd = reads_teacher && !empty ? finish_divergence(sums) : 0.f;

    if (team.rank == 0 && team.thread == 0) {
      float ce = 0, label_log_prob = 0;
      if (ce_scale != 0 || stats_ce) {
        float smoothing = static_cast<float>(p.label_smoothing);
        label_log_prob = row->student_label - unit.anchor - unit.log_z;
        ce = (1 - smoothing) * -label_log_prob;
        double logits = sums.logits;
        if (excludes) logits += row->student_label - unit.anchor;
        float mean = static_cast<float>(logits / static_cast<double>(p.vocab));
        if (smoothing != 0) ce += smoothing * (unit.log_z - mean);
      }
      p.line(kStudentMax, i) = student.anchor;
      p.line(kStudentLogZ, i) = student.log_z;
      p.line(kTeacherMax, i) = teacher.anchor;
      p.line(kTeacherLogZ, i) = teacher.log_z;
      p.line(kDivergence, i) = divergence;
      p.line(kSumG, i) = effective == Divergence::renyi ? weights.log_b : sum_g;
      p.line(kUnitLogZ, i) = unit.log_z;
      write_options();
      float total = times(kd_scale, kd) + times(ce_scale, ce) + times(z_scale, unit_lse * unit_lse);
      p.totals[i] = row->bad_label ? not_a_number<float>() : total;
      if (p.return_stats) write_statistics(stats_kd, stats_ce, sums, kd, ce, label_log_prob);
    }
    if (writes || (p.student_grad.data == nullptr && p.teacher_grad.data == nullptr)) {
      if (writes) put_zeros(team, p.student_grad, i, p.vocab);
      return;
    }
    if (excludes) odds_gradient = label_and_rest().odds_gradient;
    gradient_sweep(plan.keeps && one_pass);
  }

  __device__ void write_statistics(bool stats_kd, bool stats_ce, const Sums& sums, float kd,
                                   float ce, float label_log_prob) {
    float temperature = row->options.temperature;
    float t2 = p.t_squared ? temperature * temperature : 1.f;
    float student_entropy = static_cast<float>(sums.student_entropy);
    float teacher_entropy = static_cast<float>(sums.teacher_entropy);
    if (excludes) {
      student_entropy = whole_entropy(student.log_probability(row->student_label), student_entropy);
      teacher_entropy = whole_entropy(teacher.log_probability(row->teacher_label), teacher_entropy);
    }
    bool agrees = sums.student_top == sums.teacher_top;
    p.line(kKd, i) = stats_kd ? kd * t2 : 0.f;
    p.line(kCe, i) = stats_ce ? ce : 0.f;
    p.line(kStudentEntropy, i) = stats_kd ? student_entropy : 0.f;
    p.line(kTeacherEntropy, i) = stats_kd ? teacher_entropy : 0.f;
    p.line(kLabelLogProb, i) = stats_ce ? label_log_prob : 0.f;
    p.line(kAgreement, i) = stats_kd && agrees ? 1.f : 0.f;
  }

  // The wanted gradients from the lines that forward left.
  __device__ void backward() {
    if (!reads_teacher && !reads_unit) return masked();
    student.anchor = row->student_anchor;
    student.log_z = row->student_log_z;
    student.factor = expf(-student.log_z);
    teacher.anchor = row->teacher_anchor;
    teacher.log_z = row->teacher_log_z;
    teacher.factor = expf(-teacher.log_z);
    stage(0, false);
    unit.anchor = student.anchor;
    if (excludes) {  // only then does the maximum leave a column out
      float excluded = row->student_label;
      bool rest_is_empty = student.log_z == -infinity<float>();  // its anchor is then a mere 0
      unit.anchor = excluded > unit.anchor || rest_is_empty ? excluded : unit.anchor;
    }
    unit.log_z = row->unit_log_z;
    unit.factor = expf(-unit.log_z);
    unit_scale = ce_scale + times(2 * z_scale, unit.anchor + unit.log_z);
    divergence = row->divergence;
    sum_g = row->sum_g;
    if (effective == Divergence::renyi) {
      weights.log_b = sum_g;
      sum_g = -1;
    }
    if (excludes && reads_teacher) odds_gradient = label_and_rest().odds_gradient;
    gradient_sweep(false);
  }

  // Step 1.
  __device__ void statistics() {
    const float inf = infinity<float>();
    Statistics all = Statistics::none();
    all.student_c = student.c;
    all.teacher_c = teacher.c;
    bool reads_unit_sum = reads_unit && !unit_is_student;
    for (int tile = 0; tile < tiles(); ++tile) {
      stage(tile, false);
      int excluded = excluded_in(tile);
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
        all.sums.student *= rescale(before.student, all.maxima.student, student.c);
        all.sums.teacher *= rescale(before.teacher, all.maxima.teacher, teacher.c);
        all.sums.unit *= rescale(before.student, all.maxima.student, log2_e<float>);
      }
      student.anchor = unit.anchor = anchored(all.maxima.student);
      teacher.anchor = anchored(all.maxima.teacher);
      Sum sum_s, sum_t, sum_u;
      for_slots(tile, [&](int slot) {
        float x[kSlot], e[kSlot];
        load_student(slot, excluded, x);
        if (reads_student_softmax) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) e[j] = student.exponential(x[j]);
          sum_s.run += total(e);
          if (plan.keeps) store_floats(kept_student, slot, e);
        }
        if (reads_unit_sum) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) e[j] = unit.exponential(x[j]);
          sum_u.run += total(e);
        }
        if (!reads_teacher) return;
        load_teacher(slot, excluded, x);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) e[j] = teacher.exponential(x[j]);
        sum_t.run += total(e);
        if (plan.keeps) store_floats(kept_teacher, slot, e);
      });
      all.sums.student += sum_s.run;
      all.sums.teacher += sum_t.run;
      all.sums.unit += sum_u.run;
    }
    team.reduce(all.sums);
    Maxima own = all.maxima;
    team.exchange(all);
    student.anchor = anchored(all.maxima.student);
    if (reads_student_softmax) set(student, all.sums.student);
    if (reads_teacher) {
      teacher.anchor = anchored(all.maxima.teacher);
      set(teacher, all.sums.teacher);
    }
    // What the kept exponentials are to be multiplied by.
    if (plan.keeps) {
      student.factor *= rescale(own.student, all.maxima.student, student.c);
      teacher.factor *= rescale(own.teacher, all.maxima.teacher, teacher.c);
    }
    if (!reads_unit) {
      unit.anchor = 0;
    } else if (unit_is_student) {
      unit = student;
    } else {
      float maximum = all.maxima.student;
      if (excludes) {
        float label = row->student_label, both = fmaxf(maximum, label);
        unit.anchor = anchored(both);
        all.sums.unit = all.sums.unit * rescale(maximum, both, log2_e<float>) +
                        exp2_hardware((label - unit.anchor) * log2_e<float>);
        // backward finds the anchor there
        if (!reads_teacher) student.anchor = unit.anchor;
      } else {
        unit.anchor = student.anchor;
      }
      set(unit, all.sums.unit);
    }
  }

  __device__ static void set(Softmax& softmax, double z) {
    softmax.log_z = log_of_sum(z - 1);
    softmax.factor = 1 / static_cast<float>(z);
  }

  // ---- terms ----

  struct Terms {
    float phi[kSlot], g[kSlot], h[kSlot];
  };

  template <class Which>
  __device__ __forceinline__ void terms_as(const float (&s)[kSlot], const float (&t)[kSlot],
                                           const float (&p)[kSlot], const float (&q)[kSlot],
                                           Terms& out) const {
#pragma unroll
    for (int j = 0; j < kSlot; ++j) {
      float a = student.log_probability(s[j]), b = teacher.log_probability(t[j]);
      float e = Which::mixes ? expm1_nonpositive(-absolute(a - b)) : 0.f;
      Term<float> term = Which::term(a, b, p[j], q[j], e, weights);
      out.phi[j] = term.phi;
      out.g[j] = term.g;
      out.h[j] = term.h;
    }
  }

  __device__ __forceinline__ void terms(const float (&s)[kSlot], const float (&t)[kSlot],
                                        const float (&p)[kSlot], const float (&q)[kSlot],
                                        Terms& out) const {
    if constexpr (has_ends<D>) {
      if (effective == Divergence::forward_kl) return terms_as<ForwardKL>(s, t, p, q, out);
      if (effective == Divergence::reverse_kl) return terms_as<ReverseKL>(s, t, p, q, out);
    }
    terms_as<D>(s, t, p, q, out);
  }

  // p of a slot. Never fused into a difference of probabilities, which is 0 where they are equal.
  __device__ __forceinline__ static void probabilities(const Softmax& softmax, const Area* kept,
                                                       int slot, const float (&x)[kSlot],
                                                       float (&p)[kSlot]) {
    if (kept) {
      load_floats(*kept, slot, p);
#pragma unroll
      for (int j = 0; j < kSlot; ++j) p[j] = __fmul_rn(p[j], softmax.factor);
    } else {
#pragma unroll
      for (int j = 0; j < kSlot; ++j) {
        p[j] = __fmul_rn(softmax.exponential(x[j]), softmax.factor);
      }
    }
  }

  // Step 2, and step 3 with it where `writes`; `wants_terms` leaves p and G where the exponentials
  // were.
  __device__ Sums term_sweep(bool stats_kd, bool reads_mean, bool writes, bool wants_terms) {
    Sums sums = Sums::none();
    float student_top = student.anchor, teacher_top = teacher.anchor;
    if (stats_kd && excludes) {
      student_top = fmaxf(student_top, row->student_label);
      teacher_top = fmaxf(teacher_top, row->teacher_label);
    }
    const Area* kept_s = plan.keeps ? &kept_student : nullptr;
    const Area* kept_t = plan.keeps ? &kept_teacher : nullptr;
    for (int tile = 0; tile < tiles(); ++tile) {
      stage(tile, true);
      int excluded = excluded_in(tile), label = label_in(tile);
      Sum phi, g, student_entropy, teacher_entropy, logits;
      for_slots(tile, [&](int slot) {
        float s[kSlot], t[kSlot];
        load_student(slot, excluded, s);
        if (reads_mean) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            bool counts = slot * kSlot + j < columns(tile) && slot * kSlot + j != excluded;
            logits.run += counts ? s[j] - unit.anchor : 0.f;
          }
        }
        if (!reads_teacher) return;
        load_teacher(slot, excluded, t);
        float p_[kSlot], q[kSlot];
        probabilities(student, kept_s, slot, s, p_);
        probabilities(teacher, kept_t, slot, t, q);
        if (stats_kd) {
          float hs = 0, ht = 0;
          int64_t first = first_column(tile) + slot * kSlot;
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            hs -= weighted(p_[j], student.log_probability(s[j]));
            ht -= weighted(q[j], teacher.log_probability(t[j]));
            bool here = slot * kSlot + j < columns(tile);
            int column = static_cast<int>(first) + j;
            if (here && s[j] == student_top) sums.student_top = min(sums.student_top, column);
            if (here && t[j] == teacher_top) sums.teacher_top = min(sums.teacher_top, column);
          }
          student_entropy.run += hs;
          teacher_entropy.run += ht;
        }
        Terms out;
        terms(s, t, p_, q, out);
        phi.run += total(out.phi);
        g.run += total(out.g);
        if (writes) {
          student_slot(slot, label, s, p_, out.g);
        } else if (plan.keeps && wants_terms) {
          store_floats(kept_student, slot, p_);
          store_floats(kept_teacher, slot, out.g);
        }
      });
      sums.phi += phi.run;
      sums.g += g.run;
      sums.student_entropy += student_entropy.run;
      sums.teacher_entropy += teacher_entropy.run;
      sums.logits += logits.run;
      if (writes) {
        team.sync();
        put(team, student_area, piece(p.student_grad, tile));
      }
    }
    team.reduce(sums);
    team.exchange(sums);
    if (stats_kd && excludes) {
      int label = row->label;
      if (row->student_label == student_top) sums.student_top = min(sums.student_top, label);
      if (row->teacher_label == teacher_top) sums.teacher_top = min(sums.teacher_top, label);
    }
    return sums;
  }

  // D, ΣG and the KD term before T².
  __device__ float finish_divergence(const Sums& sums) {
    divergence = static_cast<float>(sums.phi < 0 ? 0 : sums.phi);
    if (effective == Divergence::renyi) {
      float order = weights.first, log_b = weights.log_b;
      // Near B = 1 the digits are in alpha's Bregman sum, far from it in the log-sum-exp.
      divergence = (absolute(log_b) < 0.5f ? log1pf(order * (order - 1) * divergence) : log_b) /
                   (order - 1);
      sum_g = -1;
      return divergence;
    }
    if (excludes) {
      Binary<float> binary = label_and_rest();
      sum_g = weights.first * (binary.student_label - binary.teacher_label);
      return times(weights.first, binary.kl) + times(weights.second, divergence);
    }
    // ΣG = 0 is known of forward KL.
    sum_g = effective == Divergence::forward_kl ? 0.f : static_cast<float>(sums.g);
    return divergence;
  }

  // Rényi's log Σ q^r p^(1−r).
  __device__ float log_b() {
    Geometric all = Geometric::none();
    for (int tile = 0; tile < tiles(); ++tile) {
      stage(tile, true);
      auto each = [&](auto use) {
        for_slots(tile, [&](int slot) {
          float s[kSlot], t[kSlot];
          load_student(slot, -kSlot, s);
          load_teacher(slot, -kSlot, t);
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            s[j] = geometric(student.log_probability(s[j]), teacher.log_probability(t[j]),
                             weights.first);
          }
          use(s);
        });
      };
      Maxima here{-infinity<float>(), -infinity<float>()};
      each([&](const float(&x)[kSlot]) { here.student = fmaxf(here.student, largest(x)); });
      team.reduce(here);
      float maximum = fmaxf(all.maximum, here.student), anchor = anchored(maximum);
      all.sum *= rescale(all.maximum, maximum, log2_e<float>);
      all.maximum = maximum;
      Sum sum;
      each([&](const float(&x)[kSlot]) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) sum.run += exp2_hardware((x[j] - anchor) * log2_e<float>);
      });
      all.sum += sum.run;
    }
    team.reduce(all);
    team.exchange(all);
    if (all.maximum == infinity<float>()) return all.maximum;
    return anchored(all.maximum) + log_of_sum(all.sum - 1);
  }

  __device__ Binary<float> label_and_rest() const {
    return Binary<float>(student.log_probability(row->student_label),
                         teacher.log_probability(row->teacher_label));
  }

  // ---- gradients ----

  // Step 3; `has_terms`: p and G lie where the exponentials were.
  __device__ void gradient_sweep(bool has_terms) {
    bool wants_student = p.student_grad.data != nullptr;
    bool wants_teacher = p.teacher_grad.data != nullptr;
    bool has_kd = kd_scale != 0;
    bool kept = plan.keeps && !call.backward;
    for (int tile = 0; tile < tiles(); ++tile) {
      if (!call.backward || tile > 0) stage(tile, true);
      int excluded = excluded_in(tile), label = label_in(tile);
      for_slots(tile, [&](int slot) {
        float s[kSlot], t[kSlot], p_[kSlot], q[kSlot];
        load_student(slot, excluded, s);
        Terms out;
        if (has_kd && has_terms) {
          load_floats(kept_student, slot, p_);
          load_floats(kept_teacher, slot, out.g);
        } else if (has_kd || unit_is_student) {
          probabilities(student, kept ? &kept_student : nullptr, slot, s, p_);
        }
        if (has_kd && !has_terms) {
          load_teacher(slot, excluded, t);
          probabilities(teacher, kept ? &kept_teacher : nullptr, slot, t, q);
          terms(s, t, p_, q, out);
        }
        if (wants_teacher) teacher_slot(slot, label, q, out.h);
        if (wants_student) student_slot(slot, label, s, p_, out.g);
      });
      team.sync();
      if (wants_student) put(team, student_area, piece(p.student_grad, tile));
      if (wants_teacher) put(team, teacher_area, piece(p.teacher_grad, tile));
    }
    if (wants_student) put_zeros(team, p.student_grad, i, p.vocab);
    if (wants_teacher) put_zeros(team, p.teacher_grad, i, p.vocab);
  }

  // The student's gradient of a slot, over the student's logits in shared memory.
  __device__ __forceinline__ void student_slot(int slot, int label, const float (&s)[kSlot],
                                               const float (&p_)[kSlot],
                                               const float (&g)[kSlot]) const {
    float upstream = row->upstream;
    float scale = kd_scale * upstream * student.inverse_temperature;
    float out[kSlot];
    if (kd_scale != 0) {
      float g_factor = excludes ? scale * weights.second : scale, p_factor = -scale * sum_g;
#pragma unroll
      for (int j = 0; j < kSlot; ++j) out[j] = g[j] * g_factor + p_[j] * p_factor;
    } else {
#pragma unroll
      for (int j = 0; j < kSlot; ++j) out[j] = 0;
    }
    int at = label - slot * kSlot;
    if (excludes) replace(out, at, kd_scale != 0 ? scale * sum_g : 0.f);
    if (ce_scale != 0 || z_scale != 0) {
      float unit_factor = unit_scale * upstream, ce = ce_scale * upstream;
      float smoothing = static_cast<float>(p.label_smoothing);
      float uniform = ce * smoothing / static_cast<float>(p.vocab);
      float x[kSlot];
#pragma unroll
      for (int j = 0; j < kSlot; ++j) x[j] = s[j];
      if (excludes) replace(x, at, row->student_label);
      if (unit_is_student) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) out[j] = p_[j] * unit_factor + (out[j] - uniform);
      } else {
        float factor = unit.factor * unit_factor;
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          out[j] = unit.exponential(x[j]) * factor + (out[j] - uniform);
        }
      }
      if (ce_scale != 0 && static_cast<unsigned>(at) < kSlot) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) out[j] -= j == at ? ce * (1 - smoothing) : 0.f;
      }
    }
    store_slot(student_area, slot, p.student.dtype, out);
  }

  // The teacher's, (H − q·ΣH)·scale, over the teacher's logits.
  __device__ __forceinline__ void teacher_slot(int slot, int label, const float (&q)[kSlot],
                                               const float (&h)[kSlot]) const {
    float out[kSlot];
    if (kd_scale == 0) {
#pragma unroll
      for (int j = 0; j < kSlot; ++j) out[j] = 0;
    } else {
      float scale = kd_scale * row->upstream * teacher.inverse_temperature;
      float factor = 1, sum_h = divergence - sum_g, at_label = 0;
      if (effective == Divergence::reverse_kl) {
        sum_h = 0;  // Σq − Σp
      } else if (effective == Divergence::ab) {
        sum_h = (weights.first + weights.second) * divergence - sum_g;
      } else if (effective == Divergence::renyi) {
        sum_h = weights.first / (weights.first - 1);
      } else if (excludes) {
        factor = weights.second;
        at_label = weights.first * odds_gradient;
        sum_h = factor * divergence + at_label;
      }
#pragma unroll
      for (int j = 0; j < kSlot; ++j) out[j] = h[j] * (scale * factor) + q[j] * (-scale * sum_h);
      if (excludes) replace(out, label - slot * kSlot, at_label * scale);
    }
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
      for (int64_t i = team.thread; i < p.n; i += team.threads) {
        int mask = mask_of(p, i);
        double weight = weight_of(p, i);
        sum.kd += mask & kKdCounts ? weight : 0;
        sum.ce += mask & kCeCounts ? weight : 0;
      }
      team.reduce(sum);
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
  // A warp is enough, and is a team of its own where rows have a warp each.
  if (threadIdx.x >= 32) return;
  Loss loss{0};
  for (int64_t i = threadIdx.x; i < call.problem.n; i += 32) {
    loss.sum += __ldcg(call.problem.totals + i);
  }
  loss.across(32);
  if (threadIdx.x == 0) *call.loss = static_cast<float>(loss.sum);
}

template <class D>
__global__ void __launch_bounds__(kThreads, 2) distillation_rows(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char memory[];
  __shared__ Mailbox mailbox;
  __shared__ Row rows[kWarps];
  __shared__ bool last;
  Team team(call.plan, &mailbox, call.workspace);
  int warp = call.plan.split == Split::warps ? threadIdx.x / 32 : 0;
  int bytes = call.plan.shared_bytes / (call.plan.split == Split::warps ? kWarps : 1);
  Divisors divisors{1, 1};
  if (!call.backward) divisors = normalisers(call.problem, team);
  RowKernel<D> kernel(call, team, rows + warp, Memory{memory + warp * bytes});
  for (int64_t i = team.first_row; i < call.problem.n; i += team.stride) {
    kernel.begin(i, divisors);
    if (call.backward) {
      kernel.backward();
    } else {
      kernel.forward();
    }
    team.sync();  // nobody is still reading what the next row overwrites
  }
  if (!call.backward) add_up(call, team, &last);
}

}  // namespace
#endif

}  // namespace kd
