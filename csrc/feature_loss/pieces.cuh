// The device code of feature_loss, for its own kernels and joint_distillation_loss's. Every element
// is read once (Metric::attention: the student twice) and its gradient written in the same launch.
//
// Blocks take pieces (cuda.h) in turn. What a piece adds to its sample's value goes to device
// memory, and the last block to finish adds all of it up in order. Where something of the whole
// batch comes first (a divisor made of masks, a sample's map, a channel's variance) blocks wait for
// each other: such a launch is cooperative.
#pragma once

#include <type_traits>

#include "../blocks.cuh"
#include "cuda.h"

namespace kd::features {

enum class Family { elements, gaussian, vectors, maps };

// Blocks that rest on a multiprocessor, by registers: what only streams wants many. One more of
// either kind spills (sm_80, sm_90).
constexpr int blocks_of(Family family) { return family == Family::elements ? 3 : 2; }

constexpr int kStats = 3;  // 1/‖A(s)‖, 1/‖A(t)‖ and Σ Â·slope of a sample

struct Counters {
  unsigned ticket, arrived;
};

struct Call {
  Plan plan;
  Family family;
  Metric metric;
  float beta, inverse_beta;  // (the latter 0 where beta is)
  bool none;                 // reduction
  bool waits;                // blocks wait for each other
  int count;
  const float* weights;
  const float* upstream;
  int64_t upstream_stride;
  const float* base;  // what the loss is added to, if anything
  float* loss;
  float* parts;
  Counters* counters;
  double* divisors;  // (count, blocks): what each block found of a sum of mask weights
  double* values;    // of every piece, before the scale
  int64_t pieces;
  DeviceLayer layers[kLayersALaunch];
};

// Shared memory of a block before what `keeps` needs: sums that go from thread to thread.
constexpr int kExchange = kThreads * kSlot * 4 + 512;

#if defined(__CUDACC__)
namespace {

struct Sum {
  double value;
  __device__ void across(int width) { value = lanes_sum(value, width); }
};
struct Pair {
  float first, second;
  __device__ void across(int width) {
    first = lanes_sum(first, width);
    second = lanes_sum(second, width);
  }
};

// The compiler does not see that the addresses in a Call are of global memory. What is read is not
// written in the same launch, or by the same thread afterwards.
__device__ __forceinline__ float load_global(const char* at, Dtype dtype) {
  if (dtype == Dtype::float32) return __ldg(reinterpret_cast<const float*>(at));
  unsigned bits = __ldg(reinterpret_cast<const uint16_t*>(at));
  return dtype == Dtype::bfloat16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

__device__ __forceinline__ void store_one(char* data, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::float32) {
    __stwb(reinterpret_cast<float*>(data) + at, x);
  } else {
    float both[kSlot] = {x};
    __stwb(reinterpret_cast<uint16_t*>(data) + at, static_cast<uint16_t>(pack(both, dtype).x));
  }
}

// A log-variance may be float64 whatever the features are.
__device__ __forceinline__ float variance_at(const Feature& f, int64_t c) {
  c *= f.strides.channel;
  return f.dtype == Dtype::float64 ? static_cast<float>(reinterpret_cast<const double*>(f.data)[c])
                                   : load_one(f.data, f.dtype, c);
}

// The columns of a piece in slots of eight: neighbours, whose slots are all full and lie at
// multiples of 16 bytes in every feature (kWide), or every slots-th column.
struct Columns {
  int n, slots;
  template <bool kWide>
  __device__ __forceinline__ int at(int slot, int j) const {
    return kWide ? slot * kSlot + j : j * slots + slot;
  }
};

// A piece of one feature; strides in bytes.
struct View {
  char* data;
  Dtype dtype;
  int64_t row, column;

  template <bool kWide>
  __device__ __forceinline__ void load(const Columns& columns, int r, int slot,
                                       float (&x)[kSlot]) const {
    const char* from = data + r * row;
    if constexpr (kWide) {
      if (dtype == Dtype::float32) {
        float4 a = __ldg(reinterpret_cast<const float4*>(from) + 2 * slot);
        float4 b = __ldg(reinterpret_cast<const float4*>(from) + 2 * slot + 1);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
      } else {
        unpack(__ldg(reinterpret_cast<const uint4*>(from) + slot), dtype, x);
      }
    } else {
      from += slot * column;
      int64_t step = columns.slots * column;
#pragma unroll
      for (int j = 0; j < kSlot; ++j) {
        x[j] = j * columns.slots + slot < columns.n ? load_global(from, dtype) : 0.f;
        from += step;
      }
    }
  }
  template <bool kWide>
  __device__ __forceinline__ void store(const Columns& columns, int r, int slot,
                                        const float (&x)[kSlot]) const {
    char* to = data + r * row;
    if constexpr (kWide) {
      if (dtype == Dtype::float32) {
        float4* at = reinterpret_cast<float4*>(to) + 2 * slot;
        __stwb(at, make_float4(x[0], x[1], x[2], x[3]));
        __stwb(at + 1, make_float4(x[4], x[5], x[6], x[7]));
      } else {
        __stwb(reinterpret_cast<uint4*>(to) + slot, pack(x, dtype));
      }
    } else {
      to += slot * column;
      int64_t step = columns.slots * column;
#pragma unroll
      for (int j = 0; j < kSlot; ++j) {
        if (j * columns.slots + slot < columns.n) store_one(to, dtype, 0, x[j]);
        to += step;
      }
    }
  }
};

// (φ, φ′) of l2 and smooth_l1.
__device__ __forceinline__ void distance(float d, bool is_l2, float beta, float inverse_beta,
                                         float& phi, float& slope) {
  float size = fabsf(d), quotient = d * inverse_beta;
  bool linear = !(size < beta);
  float sign = d > 0 ? 1.f : d < 0 ? -1.f : d;
  phi = is_l2 ? d * d : linear ? size - 0.5f * beta : 0.5f * d * quotient;
  slope = is_l2 ? 2 * d : linear ? sign : quotient;
}

__device__ __forceinline__ float inverse_norm(float square) {
  float norm = sqrtf(square);
  return norm < static_cast<float>(kSmallestNorm) ? 0.f : 1 / norm;
}

// All blocks that share a launch's features.
struct Blocks {
  const Call& call;
  Team& team;  // this block
  int block, blocks;
  unsigned met = 0, exchanges = 0;
  int layer = -1;  // the one `scale` is of
  float scale = 0;

  __device__ Blocks(const Call& call, Team& team, int block, int blocks)
      : call(call), team(team), block(block), blocks(blocks) {}

  __device__ __forceinline__ double sum(double x) {
    Sum all{x};
    team.reduce_block(all);
    return all.value;
  }

  // Everything that any block wrote before is there for all of them, past the first-level cache.
  __device__ void meet() {
    ++met;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicAdd(&call.counters->arrived, 1);
      while (*static_cast<volatile unsigned*>(&call.counters->arrived) < met * blocks) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  __device__ static float mask_at(const DeviceLayer& l, int64_t sample, int64_t position) {
    int64_t o = position / l.inner;
    return l.mask[l.offset(l.mask_strides, sample, o) + position % l.inner * l.mask_strides.inner];
  }

  // What this block finds of the sums of mask weights.
  __device__ __noinline__ void sum_masks() {
    for (int i = 0; i < call.count; ++i) {
      const DeviceLayer& l = call.layers[i];
      if (!l.divides) continue;
      int64_t positions = l.positions();
      double mine = 0;
      if (l.of_samples) {
        // Samples: each counts with the mean weight of its positions that count.
        for (int64_t sample = block; sample < l.samples; sample += blocks) {
          double weights = 0, counted = 0;
          for (int64_t k = threadIdx.x; k < positions; k += kThreads) {
            float weight = mask_at(l, sample, k);
            weights += weight;
            counted += weight != 0;
          }
          weights = sum(weights);
          counted = sum(counted);
          mine += counted > 0 ? weights / counted : 0;
        }
      } else {
        int64_t step = int64_t(blocks) * kThreads;
        for (int64_t k = int64_t(block) * kThreads + threadIdx.x; k < l.samples * positions;
             k += step) {
          mine += mask_at(l, k / positions, k % positions);
        }
        mine = sum(mine);
      }
      if (threadIdx.x == 0) __stcg(call.divisors + int64_t(i) * blocks + block, mine);
    }
  }

  // Of a layer: weight/divisor. Every thread comes here.
  __device__ __noinline__ float scale_of(int i) {
    if (i == layer) return scale;
    layer = i;
    const DeviceLayer& l = call.layers[i];
    double divisor = l.divisor;
    if (l.divides) {
      double mine = 0;
      for (int k = threadIdx.x; k < blocks; k += kThreads) {
        mine += __ldcg(call.divisors + int64_t(i) * blocks + k);
      }
      divisor = sum(mine) * l.divisor_factor;
      if (divisor == 0) divisor = 1;
    }
    double weight = call.weights ? static_cast<double>(call.weights[i]) : l.weight;
    return scale = static_cast<float>(weight / divisor);
  }

  __device__ float factor_of(const DeviceLayer& l, float scale, int64_t sample) const {
    int64_t unit = (l.first_unit + sample) * call.upstream_stride;
    return scale == 0 ? 0.f : scale * (call.upstream ? call.upstream[unit] : 1.f);
  }

  // Sums of P pairs over the threads that share a vector, in every thread of it. kAlong: `lanes`
  // neighbours; else every lanes-th thread of the block, lanes being 8 at most.
  template <bool kAlong, int P>
  __device__ __forceinline__ void over_channels(int lanes, float (&first)[P], float (&second)[P]) {
    if constexpr (kAlong) {
      Pair pair{first[0], second[0]};
      if (lanes > 32) {
        team.reduce_block(pair);
      } else {
        pair.across(lanes);
      }
      first[0] = pair.first, second[0] = pair.second;
    } else {
      float* shared =
          reinterpret_cast<float*>(shared_memory) + (exchanges++ % 2) * (kWarps * 8 * 17);
      int warp = threadIdx.x / 32, lane = threadIdx.x % lanes;
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) {
        if (step >= lanes) {
#pragma unroll
          for (int j = 0; j < P; ++j) {
            first[j] += __shfl_xor_sync(0xffffffffu, first[j], step);
            second[j] += __shfl_xor_sync(0xffffffffu, second[j], step);
          }
        }
      }
      if (threadIdx.x % 32 < lanes) {
#pragma unroll
        for (int j = 0; j < P; ++j) {
          shared[(warp * 8 + lane) * 17 + j] = first[j];
          shared[(warp * 8 + lane) * 17 + 8 + j] = second[j];
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < P; ++j) {
        first[j] = second[j] = 0;
        for (int w = 0; w < kWarps; ++w) {
          first[j] += shared[(w * 8 + lane) * 17 + j];
          second[j] += shared[(w * 8 + lane) * 17 + 8 + j];
        }
      }
    }
  }
};

// Piece k of a layer.
struct At {
  const DeviceLayer& l;
  int64_t sample, outer, first;
  int n;  // positions

  __device__ At(const DeviceLayer& l, int64_t k) : l(l) {
    int64_t line = k / l.pieces_a_line;
    first = k % l.pieces_a_line * l.piece_positions;
    n = static_cast<int>(min(l.piece_positions, l.inner - first));
    sample = line / l.outer_size();
    outer = line % l.outer_size();
  }
  __device__ View view(const Feature& f) const {
    const Strides& s = f.strides;
    int64_t size = size_of(f.dtype);
    return {f.data + (l.offset(s, sample, outer) + first * s.inner) * size, f.dtype,
            (l.along ? s.inner : s.channel) * size, (l.along ? s.channel : s.inner) * size};
  }
  __device__ Columns columns(int64_t channels) const {
    int n_columns = l.along ? static_cast<int>(channels) : n;
    return {n_columns, (n_columns + kSlot - 1) / kSlot};
  }

  // The weights of a row's position (kAlong), or of a slot's; 0 where there is no position.
  template <bool kAlong, bool kWide, int P>
  __device__ __forceinline__ void weights(const Columns& columns, int row, int slot,
                                          float (&weight)[P]) const {
    const float* mask = nullptr;
    if (l.mask) {
      mask = l.mask + l.offset(l.mask_strides, sample, outer) + first * l.mask_strides.inner;
    }
#pragma unroll
    for (int j = 0; j < P; ++j) {
      int position = kAlong ? row : columns.at<kWide>(slot, j);
      weight[j] = position >= n ? 0.f : mask ? __ldg(mask + position * l.mask_strides.inner) : 1.f;
    }
  }
};

template <int P>
__device__ __forceinline__ bool any(const float (&x)[P]) {
  bool found = false;
#pragma unroll
  for (int j = 0; j < P; ++j) found |= x[j] != 0;
  return found;
}

// ---- l2, smooth_l1, gaussian_nll ----

template <bool gaussian, bool kAlong, bool kWide>
__device__ __noinline__ float elements(Blocks& all, const At& at, int64_t piece, float factor) {
  constexpr int P = kAlong ? 1 : kSlot, C = kAlong ? kSlot : 1;
  const Call& call = all.call;
  const DeviceLayer& l = at.l;
  View s = at.view(l.student), t = at.view(l.teacher), g = at.view(l.gradient);
  Columns columns = at.columns(l.channels);
  bool is_l2 = call.metric == Metric::l2;
  int lane = threadIdx.x % l.lanes, high = threadIdx.x / l.lanes, step = kThreads / l.lanes;
  int rows = kAlong ? at.n : static_cast<int>(l.channels);
  // Channels outside, positions inside: a channel's sums stay in registers.
  int channel_first = kAlong ? lane : high, channel_step = kAlong ? l.lanes : step;
  int channel_end = kAlong ? columns.slots : rows;
  int position_first = kAlong ? high : lane, position_step = kAlong ? step : l.lanes;
  int position_end = kAlong ? rows : columns.slots;
  float value = 0;
#pragma unroll 1
  for (int base = 0; base < channel_end; base += channel_step) {
    int at_channel = base + channel_first;
    float log_variance[C], precision[C], sums[C];
#pragma unroll
    for (int j = 0; j < C; ++j) {
      sums[j] = 0;
      log_variance[j] = 0, precision[j] = 1;
      int c = kAlong ? columns.at<kWide>(at_channel, j) : at_channel;
      if (gaussian && at_channel < channel_end && c < l.channels) {
        log_variance[j] = variance_at(l.variance, c);
        precision[j] = expf(-log_variance[j]);
      }
    }
    if (at_channel < channel_end) {
#pragma unroll 1
      for (int at_position = position_first; at_position < position_end;
           at_position += position_step) {
        int row = kAlong ? at_position : at_channel, slot = kAlong ? at_channel : at_position;
        float weight[P], x[kSlot], y[kSlot], out[kSlot];
        at.weights<kAlong, kWide>(columns, row, slot, weight);
        bool reads = any(weight);
        if (reads) s.load<kWide>(columns, row, slot, x);
        if (reads) t.load<kWide>(columns, row, slot, y);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          float w = weight[kAlong ? 0 : j], phi, slope;
          bool counts = w != 0 && columns.at<kWide>(slot, j) < columns.n;
          float d = counts ? x[j] - y[j] : 0.f;
          if (gaussian) {
            float scaled = d * precision[kAlong ? j : 0], square = d * scaled;
            phi = 0.5f * (square + log_variance[kAlong ? j : 0]);
            slope = scaled;
            sums[kAlong ? j : 0] += counts ? w * (0.5f * (1 - square)) : 0.f;
          } else {
            distance(d, is_l2, call.beta, call.inverse_beta, phi, slope);
          }
          value += counts ? w * phi : 0.f;
          out[j] = counts && factor != 0 ? factor * (w * slope) : 0.f;
        }
        if (g.data) g.store<kWide>(columns, row, slot, out);
      }
    }
    if (gaussian && l.variance_sums) {
      float* to = l.variance_sums + piece * l.channels;
      if constexpr (kAlong) {
        float* shared = reinterpret_cast<float*>(shared_memory);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kSlot; ++j) shared[j * kThreads + threadIdx.x] = sums[j];
        __syncthreads();
        if (high == 0 && at_channel < channel_end) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            float sum = 0;
            for (int k = 0; k < step; ++k) sum += shared[j * kThreads + k * l.lanes + lane];
            int c = columns.at<kWide>(at_channel, j);
            if (c < l.channels) __stcg(to + c, sum);
          }
        }
      } else {
        float sum = lanes_sum(sums[0], l.lanes);
        if (lane == 0 && at_channel < channel_end) __stcg(to + at_channel, sum);
      }
    }
  }
  return value;
}

// ---- cosine, normalised l2 and smooth_l1 ----

// The k-th slot that this thread keeps, of the student (0) or the teacher (1).
__device__ __forceinline__ float4* kept(int k, int which) {
  float4* shared = reinterpret_cast<float4*>(shared_memory + kExchange);
  return shared + (k * 4 + which * 2) * kThreads + threadIdx.x;
}
__device__ __forceinline__ void keep(int k, int which, const float (&x)[kSlot]) {
  float4* to = kept(k, which);
  to[0] = make_float4(x[0], x[1], x[2], x[3]);
  to[kThreads] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void take(int k, int which, float (&x)[kSlot]) {
  const float4* from = kept(k, which);
  float4 a = from[0], b = from[kThreads];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

template <bool kAlong, bool kWide>
__device__ __noinline__ float vectors(Blocks& all, const At& at, float factor) {
  constexpr int P = kAlong ? 1 : kSlot;
  const Call& call = all.call;
  const DeviceLayer& l = at.l;
  View s = at.view(l.student), t = at.view(l.teacher), g = at.view(l.gradient);
  Columns columns = at.columns(l.channels);
  bool cosine = call.metric == Metric::cosine, is_l2 = call.metric != Metric::smooth_l1;
  int lane = threadIdx.x % l.lanes, high = threadIdx.x / l.lanes, step = kThreads / l.lanes;
  int begin = kAlong ? lane : high, stride = kAlong ? l.lanes : step;
  int end = kAlong ? columns.slots : static_cast<int>(l.channels);
  float value = 0;
  // kAlong: `step` rows at a time. Else a piece is no wider than the threads of a row.
#pragma unroll 1
  for (int first = 0; first < (kAlong ? at.n : 1); first += step) {
    int row = first + high;
    float weight[P], x[kSlot], y[kSlot];
    at.weights<kAlong, kWide>(columns, row, lane, weight);
    bool reads = any(weight) && (kAlong || lane < columns.slots);
    auto load = [&](int i) {
      s.load<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, x);
      t.load<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, y);
      if constexpr (!kAlong) {
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          x[j] = weight[j] != 0 ? x[j] : 0.f;
          y[j] = weight[j] != 0 ? y[j] : 0.f;
        }
      }
    };
    auto again = [&](int i, int k) {
      if (l.keeps) {
        take(k, 0, x);
        take(k, 1, y);
      } else {
        load(i);
      }
    };
    float inverse[P] = {}, teacher_inverse[P] = {}, phis[P] = {}, dots[P] = {};
    if (reads) {
#pragma unroll 1
      for (int i = begin, k = 0; i < end; i += stride, ++k) {
        load(i);
        if (l.keeps) keep(k, 0, x);
        if (l.keeps) keep(k, 1, y);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          inverse[kAlong ? 0 : j] += x[j] * x[j];
          teacher_inverse[kAlong ? 0 : j] += y[j] * y[j];
        }
      }
    }
    all.over_channels<kAlong>(l.lanes, inverse, teacher_inverse);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      inverse[j] = inverse_norm(inverse[j]);
      teacher_inverse[j] = inverse_norm(teacher_inverse[j]);
    }
    auto term = [&](int j, float& unit, float& phi, float& slope) {
      int p = kAlong ? 0 : j;
      unit = x[j] * inverse[p];
      distance(unit - y[j] * teacher_inverse[p], is_l2, call.beta, call.inverse_beta, phi, slope);
      // 1 − cos = ½·‖ŝ − t̂‖², without its cancellation where the two are close.
      if (cosine) phi *= 0.5f, slope *= 0.5f;
    };
    if (reads) {
#pragma unroll 1
      for (int i = begin, k = 0; i < end; i += stride, ++k) {
        again(i, k);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          float unit, phi, slope;
          term(j, unit, phi, slope);
          phis[kAlong ? 0 : j] += phi;
          dots[kAlong ? 0 : j] += unit * slope;
        }
      }
    }
    all.over_channels<kAlong>(l.lanes, phis, dots);
    bool leads = begin == 0 && (kAlong || lane < columns.slots);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      if (cosine && (inverse[j] == 0 || teacher_inverse[j] == 0)) phis[j] = 1;
      value += leads && weight[j] != 0 ? weight[j] * phis[j] : 0.f;
    }
    if (!g.data || (kAlong ? row >= at.n : lane >= columns.slots)) continue;
#pragma unroll 1
    for (int i = begin, k = 0; i < end; i += stride, ++k) {
      float out[kSlot];
      if (reads) again(i, k);
#pragma unroll
      for (int j = 0; j < kSlot; ++j) {
        int p = kAlong ? 0 : j;
        float unit, phi, slope;
        out[j] = 0;
        if (weight[p] != 0 && factor != 0) {
          term(j, unit, phi, slope);
          out[j] = factor * (weight[p] * ((slope - unit * dots[p]) * inverse[p]));
        }
      }
      g.store<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, out);
    }
  }
  return value;
}

// ---- attention ----

// Σ x² over a feature's channels at the positions of a piece, in device memory.
template <bool kAlong, bool kWide>
__device__ __noinline__ void map_piece(Blocks& all, const At& at, const Feature& feature,
                                       int64_t channels, float* map) {
  constexpr int P = kAlong ? 1 : kSlot;
  const DeviceLayer& l = at.l;
  View x = at.view(feature);
  Columns columns = at.columns(channels);
  int lane = threadIdx.x % l.lanes, high = threadIdx.x / l.lanes, step = kThreads / l.lanes;
  int begin = kAlong ? lane : high, stride = kAlong ? l.lanes : step;
  int end = kAlong ? columns.slots : static_cast<int>(channels);
#pragma unroll 1
  for (int first = 0; first < (kAlong ? at.n : 1); first += step) {
    int row = first + high;
    float weight[P], sums[P] = {}, none[P] = {};
    at.weights<kAlong, kWide>(columns, row, lane, weight);
    if (any(weight) && (kAlong || lane < columns.slots)) {
#pragma unroll 1
      for (int i = begin; i < end; i += stride) {
        float v[kSlot];
        x.load<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, v);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          sums[kAlong ? 0 : j] += weight[kAlong ? 0 : j] != 0 ? v[j] * v[j] : 0.f;
        }
      }
    }
    all.over_channels<kAlong>(l.lanes, sums, none);
    if (begin != 0) continue;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      int position = kAlong ? row : columns.at<kWide>(lane, j);
      if (position < at.n && (kAlong || lane < columns.slots)) __stcg(map + position, sums[j]);
    }
  }
}

// Where the map of a piece begins: the student's, and `teacher` floats behind it its teacher's.
__device__ __forceinline__ float* map_of(const At& at) {
  return at.l.maps + at.sample * at.l.positions() + at.outer * at.l.inner + at.first;
}

// A sample's norms and value, from its maps.
__device__ __noinline__ double map_stats(Blocks& all, const DeviceLayer& l, int64_t sample) {
  int64_t positions = l.positions();
  const float* map = l.maps + sample * positions;
  const float* teacher = map + l.samples * positions;
  double a = 0, b = 0;
  for (int64_t k = threadIdx.x; k < positions; k += kThreads) {
    double x = __ldcg(map + k), y = __ldcg(teacher + k);
    a += x * x;
    b += y * y;
  }
  a = sqrt(all.sum(a));
  b = sqrt(all.sum(b));
  float inverse = static_cast<float>(a < kSmallestNorm ? 0 : 1 / a);
  float teacher_inverse = static_cast<float>(b < kSmallestNorm ? 0 : 1 / b);
  double value = 0, dot = 0;
  for (int64_t k = threadIdx.x; k < positions; k += kThreads) {
    float weight = l.mask ? Blocks::mask_at(l, sample, k) : 1.f;
    float unit = __ldcg(map + k) * inverse, d = unit - __ldcg(teacher + k) * teacher_inverse;
    value += times(weight, d * d);
    dot += unit * times(weight, 2 * d);
  }
  value = all.sum(value);
  dot = all.sum(dot);
  if (threadIdx.x == 0) {
    float* stats = l.stats + sample * kStats;
    __stcg(stats, inverse);
    __stcg(stats + 1, teacher_inverse);
    __stcg(stats + 2, static_cast<float>(dot));
  }
  return value;
}

template <bool kAlong, bool kWide>
__device__ __noinline__ void map_gradient(const At& at, float factor) {
  constexpr int P = kAlong ? 1 : kSlot;
  const DeviceLayer& l = at.l;
  View s = at.view(l.student), g = at.view(l.gradient);
  Columns columns = at.columns(l.channels);
  const float* stats = l.stats + at.sample * kStats;
  float inverse = __ldcg(stats), teacher_inverse = __ldcg(stats + 1), dot = __ldcg(stats + 2);
  const float* map = map_of(at);
  const float* teacher = map + l.samples * l.positions();
  int lane = threadIdx.x % l.lanes, high = threadIdx.x / l.lanes, step = kThreads / l.lanes;
  int begin = kAlong ? lane : high, stride = kAlong ? l.lanes : step;
  int end = kAlong ? columns.slots : static_cast<int>(l.channels);
#pragma unroll 1
  for (int first = 0; first < (kAlong ? at.n : 1); first += step) {
    int row = first + high;
    if (kAlong ? row >= at.n : lane >= columns.slots) continue;
    float weight[P], by[P];
    at.weights<kAlong, kWide>(columns, row, lane, weight);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      int position = kAlong ? row : columns.at<kWide>(lane, j);
      by[j] = 0;
      if (weight[j] == 0 || factor == 0) continue;
      float unit = __ldcg(map + position) * inverse;
      float slope = weight[j] * (2 * (unit - __ldcg(teacher + position) * teacher_inverse));
      by[j] = factor * (2 * ((slope - unit * dot) * inverse));
    }
    bool reads = factor != 0 && any(weight);
#pragma unroll 1
    for (int i = begin; i < end; i += stride) {
      float x[kSlot];
      if (reads) s.load<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, x);
#pragma unroll
      for (int j = 0; j < kSlot; ++j) {
        int p = kAlong ? 0 : j;
        x[j] = weight[p] != 0 && factor != 0 ? x[j] * by[p] : 0.f;
      }
      g.store<kWide>(columns, kAlong ? row : i, kAlong ? i : lane, x);
    }
  }
}

// ---- a launch ----

// The code that fits a layer's layout.
template <class F>
__device__ __forceinline__ void by_layout(const DeviceLayer& l, F run) {
  if (l.along) {
    l.wide ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
  } else {
    l.wide ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  }
}

template <class F>
__device__ __forceinline__ void for_pieces(Blocks& all, F each) {
  const Call& call = all.call;
  int i = 0;
#pragma unroll 1
  for (int64_t k = all.block; k < call.pieces; k += all.blocks) {
    while (i + 1 < call.count && k >= call.layers[i + 1].first_piece) ++i;
    const DeviceLayer& l = call.layers[i];
    float scale = all.scale_of(i);
    At at(l, k - l.first_piece);
    each(at, k, all.factor_of(l, scale, at.sample));
  }
}

// ∂/∂log_variance: the pieces' sums, by channel. A block takes 32 channels, a warp a quarter of the
// pieces.
__device__ __noinline__ void variance_gradients(Blocks& all) {
  const Call& call = all.call;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double* shared = reinterpret_cast<double*>(shared_memory);
#pragma unroll 1
  for (int i = 0; i < call.count; ++i) {
    const DeviceLayer& l = call.layers[i];
    if (!l.variance_gradient.data) continue;
    float scale = all.scale_of(i);
    int64_t part = (l.pieces + kWarps - 1) / kWarps;
    for (int64_t c = int64_t(all.block) * 32; c < l.channels; c += int64_t(all.blocks) * 32) {
      double sum = 0;
      int64_t last = min(l.pieces, (warp + 1) * part);
      for (int64_t k = warp * part; k < last && c + lane < l.channels; ++k) {
        float factor = all.factor_of(l, scale, k / l.pieces_a_sample);
        sum += times(factor, __ldcg(l.variance_sums + k * l.channels + c + lane));
      }
      __syncthreads();
      shared[threadIdx.x] = sum;
      __syncthreads();
      if (warp == 0 && c + lane < l.channels) {
        sum = ((shared[lane] + shared[32 + lane]) + shared[64 + lane]) + shared[96 + lane];
        const Feature& to = l.variance_gradient;
        if (to.dtype == Dtype::float64) {
          reinterpret_cast<double*>(to.data)[c + lane] = sum;
        } else {
          store_one(to.data, to.dtype, c + lane, static_cast<float>(sum));
        }
      }
    }
  }
}

// The parts and the loss, by the last block to get here; returns Σ parts in it.
__device__ __noinline__ double add_up(Blocks& all) {
  const Call& call = all.call;
  double loss = 0;
#pragma unroll 1
  for (int i = 0; i < call.count; ++i) {
    const DeviceLayer& l = call.layers[i];
    double scale = all.scale_of(i), part = 0;
    for (int64_t k = threadIdx.x; k < l.pieces; k += kThreads) {
      part += __ldcg(call.values + l.first_piece + k);
    }
    part = times(scale, all.sum(part));
    loss += part;
    if (threadIdx.x == 0) call.parts[i] = static_cast<float>(part);
    if (!call.none) continue;
    int width = 1;
    while (width < 32 && width < l.pieces_a_sample) width *= 2;
    int lane = threadIdx.x % width, per_round = kThreads / width;
    for (int64_t base = 0; base < l.samples; base += per_round) {
      int64_t sample = base + threadIdx.x / width;
      double value = 0;
      if (sample < l.samples) {
        const double* values = call.values + l.first_piece + sample * l.pieces_a_sample;
        for (int64_t k = lane; k < l.pieces_a_sample; k += width) value += __ldcg(values + k);
      }
      value = times(scale, lanes_sum(value, width));
      if (lane == 0 && sample < l.samples) {
        call.loss[l.first_unit + sample] = static_cast<float>(value);
      }
    }
  }
  return loss;
}

// Everything but the last sums.
template <Family family>
__device__ __forceinline__ void run_pieces(Blocks& all) {
  const Call& call = all.call;
  bool divides = false;
  for (int i = 0; i < call.count; ++i) divides |= call.layers[i].divides;
  if (divides) {
    all.sum_masks();
    all.meet();
  }
  for_pieces(all, [&](const At& at, int64_t k, float factor) {
    float value = 0;
    by_layout(at.l, [&](auto along, auto wide) {
      constexpr bool kAlong = decltype(along)::value, kWide = decltype(wide)::value;
      if constexpr (family == Family::elements || family == Family::gaussian) {
        constexpr bool gaussian = family == Family::gaussian;
        value = elements<gaussian, kAlong, kWide>(all, at, k - at.l.first_piece, factor);
      } else if constexpr (family == Family::vectors) {
        value = vectors<kAlong, kWide>(all, at, factor);
      } else {
        float* map = map_of(at);
        map_piece<kAlong, kWide>(all, at, at.l.student, at.l.channels, map);
        map += at.l.samples * at.l.positions();
        map_piece<kAlong, kWide>(all, at, at.l.teacher, at.l.teacher_channels, map);
      }
    });
    double sum = family == Family::maps ? 0 : all.sum(value);
    if (threadIdx.x == 0) __stcg(call.values + k, sum);
  });
  if constexpr (family == Family::gaussian) {
    bool wants = false;
    for (int i = 0; i < call.count; ++i) wants |= call.layers[i].variance_gradient.data != nullptr;
    if (wants) {
      all.meet();
      variance_gradients(all);
    }
  }
  if constexpr (family == Family::maps) {
    all.meet();
    for (int i = 0; i < call.count; ++i) {
      const DeviceLayer& l = call.layers[i];
      if (l.pieces == 0) continue;
      for (int64_t sample = all.block; sample < l.samples; sample += all.blocks) {
        double value = map_stats(all, l, sample);
        // A sample's value is that of its first piece.
        int64_t first = l.first_piece + sample * l.pieces_a_sample;
        if (threadIdx.x == 0) __stcg(call.values + first, value);
      }
    }
    all.meet();
    for_pieces(all, [&](const At& at, int64_t, float factor) {
      if (!at.l.gradient.data) return;
      by_layout(at.l, [&](auto along, auto wide) {
        map_gradient<decltype(along)::value, decltype(wide)::value>(at, factor);
      });
    });
  }
}

}  // namespace
#endif

}  // namespace kd::features
