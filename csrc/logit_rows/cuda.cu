// logit_rows on CUDA: a block a row, a column a thread at a time, sums in a fixed order. Simple
// kernels: they run only where an option asks for them, and what walks a row again finds it in the
// second-level cache.
#include "../distillation_loss/binary.h"
#include "../launch.cuh"
#include "cuda.h"
#include "lines.h"

namespace kd::logit_rows {
namespace {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// Sums over a block, in a fixed order, for every thread.
template <int N>
__device__ void block_sums(float (&x)[N]) {
  __shared__ float parts[N][kRowWarps];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float warp = lanes_sum(x[k], 32);
    if (threadIdx.x % 32 == 0) parts[k][threadIdx.x / 32] = warp;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = 0;
    for (int warp = 0; warp < kRowWarps; ++warp) x[k] += parts[k][warp];
  }
  __syncthreads();
}

template <int N>
__device__ void block_maxima(float (&x)[N]) {
  __shared__ float parts[N][kRowWarps];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float warp = lanes_max(x[k], 32);
    if (threadIdx.x % 32 == 0) parts[k][threadIdx.x / 32] = warp;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = parts[k][0];
    for (int warp = 1; warp < kRowWarps; ++warp) x[k] = fmaxf(x[k], parts[k][warp]);
  }
  __syncthreads();
}

__device__ __forceinline__ void store_one(char* row, Dtype dtype, int64_t column, float x) {
  if (dtype == Dtype::float32) {
    reinterpret_cast<float*>(row)[column] = x;
  } else {
    float slot[kSlot] = {x};
    reinterpret_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(pack(slot, dtype).x);
  }
}

struct MomentsCall {
  Matrix x;
  int64_t n, vocab;
  float* out;
};

__global__ void __launch_bounds__(kRowThreads) moments_rows(MomentsCall call) {
  int64_t i = blockIdx.x;
  const char* row = call.x.row(i);
  // From a column of the row, so that equal columns have deviation 0 in every dtype.
  float origin = load_one(row, call.x.dtype, 0), sum[1] = {0}, squares[1] = {0};
  for (int64_t j = threadIdx.x; j < call.vocab; j += kRowThreads) {
    sum[0] += load_one(row, call.x.dtype, j) - origin;
  }
  block_sums(sum);
  float mean = origin + sum[0] / static_cast<float>(call.vocab);
  for (int64_t j = threadIdx.x; j < call.vocab; j += kRowThreads) {
    float d = load_one(row, call.x.dtype, j) - mean;
    squares[0] += d * d;
  }
  block_sums(squares);
  if (threadIdx.x == 0) {
    call.out[i] = mean;
    call.out[call.n + i] =
        sqrtf(squares[0] / static_cast<float>(call.vocab > 1 ? call.vocab - 1 : 1));
  }
}

__global__ void __launch_bounds__(kRowThreads) add_centered_rows(Centered<float> p) {
  int64_t i = blockIdx.x;
  float factor = p.factor[i], mean = p.mean[i];
  if (factor == 0) return;
  char* grad = p.grad.row(i);
  const char* x = p.x.row(i);
  for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
    float term = factor * (load_one(x, p.x.dtype, j) - mean);
    store_one(grad, p.grad.dtype, j, load_one(grad, p.grad.dtype, j) + term);
  }
}

struct SumsCall {
  Problem<float> problem;
  float* out;
};

template <class D>
__device__ void sums_of_row(const Problem<float>& p, int64_t i, const LineSums<float>& row,
                            float sum_h, Products<float>& student, Products<float>& teacher) {
  float s_max = p.line(kStudentMax, i), t_max = p.line(kTeacherMax, i);
  float s_log_z = p.line(kStudentLogZ, i) * log2_e<float>;
  float t_log_z = p.line(kTeacherLogZ, i) * log2_e<float>;
  float cs = log2_e<float> / p.line(kTemperature, i);
  float ct = log2_e<float> / p.line(kTeacherTemperature, i);
  constexpr float ln_2 = 0.69314718f;
  for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
    if (j == row.label) continue;
    float x = load_one(p.student.row(i), p.student.dtype, j) - s_max;
    float y = load_one(p.teacher.row(i), p.teacher.dtype, j) - t_max;
    float a2 = fmaf(x, cs, -s_log_z), b2 = fmaf(y, ct, -t_log_z);
    float a = a2 * ln_2, b = b2 * ln_2;
    float e = D::mixes ? expm1_nonpositive(-absolute(a - b)) : 0.f;
    float q = exp2_hardware(b2), p_ = exp2_hardware(a2);
    Term<float> term = D::term(a, b, p_, q, e, row.weights);
    float by_s = row.factor * term.g - p_ * row.sum_g, by_t = row.factor * term.h - q * sum_h;
    student.add(times(by_s, x), by_s, times(p_, x));
    teacher.add(times(by_t, y), by_t, times(q, y));
  }
}

// Rows whose parameter makes their divergence a KL are that KL's.
template <class D>
__global__ void __launch_bounds__(kRowThreads) temperature_sums_rows(SumsCall call) {
  const Problem<float>& p = call.problem;
  int64_t i = blockIdx.x;
  Products<float> student, teacher;
  float kd = 0;
  if (p.line(kKdScale, i) != 0) {
    LineSums<float> row = line_sums(p, i);
    float sum_h = row.sum_h;
    kd = row.kd;
    if (p.divergence == Divergence::dkd) {
      bool inside = row.label >= 0 && row.label < p.vocab;
      float s =
          inside ? load_one(p.student.row(i), p.student.dtype, row.label) : not_a_number<float>();
      float t =
          inside ? load_one(p.teacher.row(i), p.teacher.dtype, row.label) : not_a_number<float>();
      float x = s - p.line(kStudentMax, i), y = t - p.line(kTeacherMax, i);
      Binary<float> binary(x / p.line(kTemperature, i) - p.line(kStudentLogZ, i),
                           y / p.line(kTeacherTemperature, i) - p.line(kTeacherLogZ, i));
      kd = times(row.weights.first, binary.kl) + times(row.weights.second, row.kd);
      float by_label = row.weights.first * binary.odds_gradient;
      sum_h = row.weights.second * row.kd + by_label;
      if (threadIdx.x == 0) {
        student.add(times(row.sum_g, x), row.sum_g, 0);
        teacher.add(times(by_label, y), by_label, 0);
      }
    }
    if (row.effective == Divergence::forward_kl) {
      sums_of_row<ForwardKL>(p, i, row, sum_h, student, teacher);
    } else if (row.effective == Divergence::reverse_kl) {
      sums_of_row<ReverseKL>(p, i, row, sum_h, student, teacher);
    } else {
      sums_of_row<D>(p, i, row, sum_h, student, teacher);
    }
    float sums[6] = {student.product, student.all, student.mean,
                     teacher.product, teacher.all, teacher.mean};
    block_sums(sums);
    student = {sums[0], sums[1], sums[2]};
    teacher = {sums[3], sums[4], sums[5]};
  }
  if (threadIdx.x == 0) {
    call.out[i] = student.centred();
    call.out[p.n + i] = teacher.centred();
    call.out[2 * p.n + i] = kd;
  }
}

// Floats as integers in the same order.
__device__ __forceinline__ int ordered(float x, int drop) {
  int bits = __float_as_int(x + 0.f);  // −0 is 0
  return (bits ^ ((bits >> 31) & 0x7fffffff)) >> drop;
}

// Two bits of the threshold a walk: from which of the next three on there is more than ½.
__global__ void __launch_bounds__(kRowThreads) adaptive_rows(Adaptive<float> p) {
  int64_t i = blockIdx.x;
  const char *s_row = p.student.row(i), *t_row = p.teacher.row(i);
  float tau_s = p.temperature.at(i), tau_t = p.teacher_temperature.at(i);
  float cs = log2_e<float> / (tau_s > 0 ? tau_s : not_a_number<float>());
  float ct = log2_e<float> / (tau_t > 0 ? tau_t : not_a_number<float>());
  auto student = [&](int64_t j) { return load_one(s_row, p.student.dtype, j); };
  auto teacher = [&](int64_t j) { return load_one(t_row, p.teacher.dtype, j); };
  float largest[2] = {-infinity<float>(), -infinity<float>()};
  for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
    largest[0] = fmaxf(largest[0], student(j));
    largest[1] = fmaxf(largest[1], teacher(j));
  }
  block_maxima(largest);
  float s_max = anchored(largest[0]), t_max = anchored(largest[1]);
  auto of_student = [&](int64_t j) { return exp2_hardware((student(j) - s_max) * cs); };
  auto of_teacher = [&](float t) { return exp2_hardware((t - t_max) * ct); };
  float z[2] = {0, 0};
  for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
    z[0] += of_student(j);
    z[1] += of_teacher(teacher(j));
  }
  block_sums(z);
  float inverse_s = 1 / z[0], inverse_t = 1 / z[1], half = 0.5f * z[1];
  auto gap = [&](int64_t j, float e) {
    return absolute(of_student(j) * inverse_s - e * inverse_t);
  };

  int drop = p.teacher.dtype == Dtype::bfloat16 ? 16 : p.teacher.dtype == Dtype::float16 ? 13 : 0;
  int rounds = (33 - drop) / 2;
  int threshold = static_cast<int>(-(1ll << (2 * rounds - 1)));
  for (int shift = 2 * (rounds - 1); shift >= 0; shift -= 2) {
    float mass[3] = {0, 0, 0};
    for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
      float t = teacher(j), e = of_teacher(t);
      int key = ordered(t, drop);
#pragma unroll
      for (int k = 0; k < 3; ++k) mass[k] += key >= threshold + ((k + 1) << shift) ? e : 0.f;
    }
    block_sums(mass);
    int more = 0;
    for (float m : mass) more += m > half;
    threshold += more << shift;
  }

  float sums[3] = {0, 0, 0}, equal[1] = {0};  // above: Σ q and Σ |p − q|; all of |p − q|
  for (int64_t j = threadIdx.x; j < p.vocab; j += kRowThreads) {
    float t = teacher(j), e = of_teacher(t), apart = gap(j, e);
    int key = ordered(t, drop);
    sums[0] += key > threshold ? e : 0.f;
    sums[1] += key > threshold ? apart : 0.f;
    sums[2] += apart;
    if (key == threshold) equal[0] = e;
  }
  block_sums(sums);
  block_maxima(equal);
  // Of equal columns at the threshold those that still fit, in order; the first in any case.
  float fit = floorf((half - sums[0]) / equal[0]), ties[1] = {0};
  if (sums[0] == 0) fit = fmaxf(fit, 1.f);
  __shared__ int counts[kRowWarps];
  int seen = 0, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t start = 0; start < p.vocab && fit >= 1 && static_cast<float>(seen) < fit;
       start += kRowThreads) {
    int64_t j = start + threadIdx.x;
    float t = j < p.vocab ? teacher(j) : 0.f;
    bool at = j < p.vocab && ordered(t, drop) == threshold;
    unsigned lanes = __ballot_sync(0xffffffffu, at);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int place = seen + __popc(lanes & ((2u << lane) - 1));
    for (int w = 0; w < kRowWarps; ++w) {
      if (w < warp) place += counts[w];
      seen += counts[w];
    }
    __syncthreads();
    if (at && static_cast<float>(place) <= fit) ties[0] += gap(j, of_teacher(t));
  }
  block_sums(ties);
  if (threadIdx.x == 0) {
    // Added up in another order, the head may exceed the whole by a rounding.
    float share = (sums[1] + ties[0]) / sums[2];
    p.weights[i] = sums[2] == 0 ? 0.5f : share > 1 ? 1.f : share;
  }
}

template <class Call>
CudaStatus launch(const char* name, void (*kernel)(Call), Call call, int64_t n, CudaStream stream) {
  if (n == 0) return {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(n));
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  void* arguments[] = {&call};
  KD_TRY(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), name);
  return {};
}

void (*sums_kernel(Divergence divergence))(SumsCall) {
  switch (divergence) {
    case Divergence::forward_kl:
    case Divergence::dkd:
      return temperature_sums_rows<ForwardKL>;
    case Divergence::reverse_kl:
      return temperature_sums_rows<ReverseKL>;
    case Divergence::jeffreys:
      return temperature_sums_rows<Jeffreys>;
    case Divergence::jsd:
      return temperature_sums_rows<JSD>;
    case Divergence::skew_forward_kl:
      return temperature_sums_rows<SkewForwardKL>;
    case Divergence::skew_reverse_kl:
      return temperature_sums_rows<SkewReverseKL>;
    case Divergence::alpha:
      return temperature_sums_rows<Alpha>;
    case Divergence::tvd:
      return temperature_sums_rows<TotalVariation>;
    case Divergence::renyi:
      return temperature_sums_rows<Renyi>;
    case Divergence::ab:
      return temperature_sums_rows<AlphaBeta>;
  }
  return nullptr;
}

}  // namespace

CudaStatus cuda_moments(const Matrix& x, int64_t n, int64_t vocab, float* out, CudaStream stream) {
  return launch("row_moments", moments_rows, MomentsCall{x, n, vocab, out}, n, stream);
}

CudaStatus cuda_add_centered(const Centered<float>& problem, int64_t n, CudaStream stream) {
  return launch("add_centered", add_centered_rows, problem, n, stream);
}

CudaStatus cuda_temperature_sums(const Problem<float>& problem, float* out, CudaStream stream) {
  return launch("temperature_sums", sums_kernel(problem.divergence), SumsCall{problem, out},
                problem.n, stream);
}

CudaStatus cuda_adaptive_weights(const Adaptive<float>& problem, int64_t n, CudaStream stream) {
  return launch("adaptive_weights", adaptive_rows, problem, n, stream);
}

}  // namespace kd::logit_rows
