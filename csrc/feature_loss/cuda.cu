// The launchers of feature_loss: how layers are divided, and the launch.
#include "../launch.cuh"
#include "cuda.h"
#include "pieces.cuh"
#include "plan.h"

namespace kd::features {
namespace {

template <Family family>
__global__ void __launch_bounds__(kThreads, blocks_of(family))
    feature_pieces(const __grid_constant__ Call call) {
  __shared__ Mailbox mailbox;
  __shared__ bool last;
  Team team(call.plan, &mailbox, nullptr);
  Blocks all(call, team, blockIdx.x, gridDim.x);
  run_pieces<family>(all);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&call.counters->ticket, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  double loss = add_up(all);
  if (threadIdx.x == 0 && !call.none) {
    *call.loss = static_cast<float>(loss + (call.base ? *call.base : 0.f));
  }
}

using Kernel = void (*)(Call);

struct ScaleCall {
  Plan plan;
  const float* factor;
  int count;
  Flat grads[kGradsALaunch];
};

__device__ __forceinline__ float scaled(float x, float by) { return x == 0 ? x : x * by; }

__global__ void __launch_bounds__(kThreads) scale_features(const __grid_constant__ ScaleCall call) {
  float by = *call.factor;
  if (by == 1) return;
  int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  for (int i = 0; i < call.count; ++i) {
    const Flat& grad = call.grads[i];
    bool aligned = (reinterpret_cast<uint64_t>(grad.data) & 15) == 0;
    int64_t slots = aligned ? grad.n / kSlot : 0;
    for (int64_t slot = thread; slot < slots; slot += step) {
      char* at = grad.data + slot * kSlot * size_of(grad.dtype);
      float x[kSlot];
      View here{at, grad.dtype, 0, 0};
      here.load<true>({}, 0, 0, x);
#pragma unroll
      for (int j = 0; j < kSlot; ++j) x[j] = scaled(x[j], by);
      here.store<true>({}, 0, 0, x);
    }
    for (int64_t k = slots * kSlot + thread; k < grad.n; k += step) {
      store_one(grad.data, grad.dtype, k, scaled(load_one(grad.data, grad.dtype, k), by));
    }
  }
}

}  // namespace

CudaStatus cuda_prepare(DeviceProblem& problem, int64_t* bytes) {
  Device device;
  CudaStatus status = current_device(kName, &device);
  if (status.code != 0) return status;
  return divide(problem, device, bytes);
}

CudaStatus cuda_feature_loss(const DeviceProblem& problem, int first, const float* base,
                             void* workspace, CudaStream stream) {
  Device device;
  CudaStatus status = current_device(kName, &device);
  if (status.code != 0) return status;
  int count = static_cast<int>(problem.layers.size());
  for (; first < count; first += kLayersALaunch) {
    Call call;
    KD_TRY(cudaMemsetAsync(workspace, 0, sizeof(Counters), stream), kName);
    fill(call, problem, first, base, workspace);
    base = problem.loss;
    Kernel kernel = call.family == Family::elements   ? feature_pieces<Family::elements>
                    : call.family == Family::gaussian ? feature_pieces<Family::gaussian>
                    : call.family == Family::vectors  ? feature_pieces<Family::vectors>
                                                      : feature_pieces<Family::maps>;
    // Without a piece there is still a loss to write.
    status = launch_rows(kName, kernel, call, call.pieces == 0 ? 1 : call.pieces, device, stream);
    if (status.code != 0) return status;
  }
  return {};
}

CudaStatus cuda_scale_features(const std::vector<Flat>& grads, const float* factor,
                               CudaStream stream) {
  const char* name = "scale_features";
  Device device;
  CudaStatus status = current_device(name, &device);
  if (status.code != 0) return status;
  for (size_t first = 0; first < grads.size(); first += kGradsALaunch) {
    ScaleCall call{{}, factor, 0, {}};
    int64_t most = 0;
    for (size_t i = first; i < grads.size() && call.count < kGradsALaunch; ++i) {
      if (grads[i].dtype == Dtype::float64) {
        return failure(cudaErrorInvalidValue, name, "float64 gradients", "");
      }
      call.grads[call.count++] = grads[i];
      most = grads[i].n > most ? grads[i].n : most;
    }
    if (most == 0) continue;
    status = launch_rows(name, scale_features, call,
                         (most + kThreads * kSlot - 1) / (kThreads * kSlot), device, stream);
    if (status.code != 0) return status;
  }
  return {};
}

}  // namespace kd::features
