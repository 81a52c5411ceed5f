// The launchers of distillation_loss: choose a kernel and its launch, no more.
#include "cuda.h"
#include "plan.h"

namespace kd {

// Each defined in the cuda_*.cu that compiles it.
extern const Kernel forward_kl_rows, reverse_kl_rows, jeffreys_rows, jsd_rows, skew_forward_kl_rows,
    skew_reverse_kl_rows, alpha_rows, tvd_rows, renyi_rows, ab_rows;

namespace {

Kernel kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::forward_kl:
    case Divergence::dkd:
      return forward_kl_rows;
    case Divergence::reverse_kl:
      return reverse_kl_rows;
    case Divergence::jeffreys:
      return jeffreys_rows;
    case Divergence::jsd:
      return jsd_rows;
    case Divergence::skew_forward_kl:
      return skew_forward_kl_rows;
    case Divergence::skew_reverse_kl:
      return skew_reverse_kl_rows;
    case Divergence::alpha:
      return alpha_rows;
    case Divergence::tvd:
      return tvd_rows;
    case Divergence::renyi:
      return renyi_rows;
    case Divergence::ab:
      return ab_rows;
  }
  return nullptr;
}

struct ScaleCall {
  Plan plan;
  Matrix matrix;
  int64_t n;
  const float* factor;
  int64_t stride;
};

__device__ float scaled(float x, float by) { return x == 0 ? x : x * by; }

__device__ void scale_one(char* row, Dtype dtype, int64_t column, float by) {
  float x = scaled(load_one(row, dtype, column), by);
  if (dtype == Dtype::float32) {
    reinterpret_cast<float*>(row)[column] = x;
  } else {
    float both[kSlot] = {x};
    reinterpret_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(pack(both, dtype).x);
  }
}

// Rows times a factor each. The blocks of a row take chunks in turn: there is nothing to exchange.
__global__ void __launch_bounds__(kThreads) scale_rows(const __grid_constant__ ScaleCall call) {
  __shared__ Mailbox mailbox;
  Team team(call.plan, &mailbox, nullptr);
  const Matrix& m = call.matrix;
  int per_chunk = static_cast<int>(16 / size_of(m.dtype));
  for (int64_t i = team.first_row; i < call.n; i += team.stride) {
    float by = call.factor[i * call.stride];
    if (by == 1) continue;
    char* row = m.row(i);
    int64_t head = (16 - (reinterpret_cast<uint64_t>(row) & 15)) % 16 / size_of(m.dtype);
    if (head > m.columns) head = m.columns;
    int64_t chunks = (m.columns - head) / per_chunk, tail = head + chunks * per_chunk;
    int step = team.threads * team.blocks, first = team.rank * team.threads + team.thread;
    if (first < head) scale_one(row, m.dtype, first, by);
    if (first < m.columns - tail) scale_one(row, m.dtype, tail + first, by);
    uint4* at = reinterpret_cast<uint4*>(row + head * size_of(m.dtype));
    for (int64_t j = first; j < chunks; j += step) {
      uint4 v = at[j];
      if (m.dtype == Dtype::float32) {
        v.x = __float_as_uint(scaled(__uint_as_float(v.x), by));
        v.y = __float_as_uint(scaled(__uint_as_float(v.y), by));
        v.z = __float_as_uint(scaled(__uint_as_float(v.z), by));
        v.w = __float_as_uint(scaled(__uint_as_float(v.w), by));
      } else {
        float x[kSlot];
        unpack(v, m.dtype, x);
#pragma unroll
        for (int k = 0; k < kSlot; ++k) x[k] = scaled(x[k], by);
        v = pack(x, m.dtype);
      }
      at[j] = v;
    }
  }
}

CudaStatus run(const char* name, Call call, CudaStream stream) {
  const Problem<float>& p = call.problem;
  for (const Matrix* m : {&p.student, &p.teacher}) {
    if (m->dtype == Dtype::float64) {
      return failure(cudaErrorInvalidValue, name, "float64 logits", "");
    }
  }
  if ((p.student_grad.data && p.student_grad.dtype != p.student.dtype) ||
      (p.teacher_grad.data && p.teacher_grad.dtype != p.teacher.dtype)) {
    return failure(cudaErrorInvalidValue, name, "a gradient of another dtype than its logits", "");
  }
  Device device;
  CudaStatus status = current_device(name, &device);
  if (status.code != 0) return status;
  call.plan = plan_call(call, device);
  bool meets = call.plan.split == Split::grid;
  if (meets || call.loss) {
    size_t used = meets ? Workspace::zeroed : sizeof(Workspace::ticket);
    KD_TRY(cudaMemsetAsync(call.workspace, 0, used, stream), name);
  }
  char kernel_name[64];
  std::snprintf(kernel_name, sizeof(kernel_name), "%s %s", name,
                divergence_names[static_cast<int>(p.divergence)]);
  return launch_rows(kernel_name, kernel_of(p.divergence), call, p.n, device, stream);
}

}  // namespace

int64_t cuda_workspace_bytes() { return sizeof(Workspace); }

CudaStatus cuda_forward(const Problem<float>& problem, float* loss, void* workspace,
                        CudaStream stream) {
  const char* name = "distillation_loss";
  if (problem.n == 0) {
    if (loss) KD_TRY(cudaMemsetAsync(loss, 0, sizeof(float), stream), name);
    return {};
  }
  return run(name, Call{problem, {}, loss, static_cast<Workspace*>(workspace), false}, stream);
}

CudaStatus cuda_backward(const Problem<float>& problem, CudaStream stream) {
  if (problem.n == 0) return {};
  return run("distillation_loss_backward", Call{problem, {}, nullptr, nullptr, true}, stream);
}

CudaStatus cuda_scale_rows(const Matrix& matrix, int64_t n, const float* factor, int64_t stride,
                           CudaStream stream) {
  const char* name = "scale_rows";
  if (n == 0 || matrix.columns == 0) return {};
  if (matrix.dtype == Dtype::float64) {
    return failure(cudaErrorInvalidValue, name, "float64 rows", "");
  }
  Device device;
  CudaStatus status = current_device(name, &device);
  if (status.code != 0) return status;
  ScaleCall call{{}, matrix, n, factor, stride};
  call.plan.split = matrix.columns <= kWarpColumns ? Split::warps : Split::block;
  call.plan.blocks = matrix.columns > 16 * kWarpColumns ? 8 : 1;
  return launch_rows(name, scale_rows, call, n, device, stream);
}

}  // namespace kd
