// The kernel of joint_distillation_loss: the first blocks take rows of logits, as distillation_loss
// does, the others pieces of features, as feature_loss does; the last to finish adds up both.
#pragma once

#include "../distillation_loss/rows.cuh"
#include "../feature_loss/pieces.cuh"

namespace kd::joint {

struct Call {
  kd::Call rows;
  features::Call features;
  int row_blocks;
  float* loss;
  float* part;
};

using Kernel = void (*)(Call);

#if defined(__CUDACC__)
namespace {

__device__ __noinline__ void run_features(features::Blocks& all) {
  switch (all.call.family) {
    case features::Family::elements:
      return features::run_pieces<features::Family::elements>(all);
    case features::Family::gaussian:
      return features::run_pieces<features::Family::gaussian>(all);
    case features::Family::vectors:
      return features::run_pieces<features::Family::vectors>(all);
    case features::Family::maps:
      return features::run_pieces<features::Family::maps>(all);
  }
}

template <class D>
__global__ void __launch_bounds__(kThreads, 2) joint_blocks(const __grid_constant__ Call call) {
  __shared__ Mailbox mailbox;
  __shared__ Row rows[kWarps];
  __shared__ bool last;
  static_assert(sizeof(mailbox) + sizeof(rows) + 64 <= kStaticShared, "what plans leave free");
  int feature_blocks = gridDim.x - call.row_blocks;
  if (blockIdx.x < call.row_blocks) {
    const Plan& plan = call.rows.plan;
    Team team(plan, &mailbox, call.rows.workspace);
    int warp = plan.split == Split::warps ? threadIdx.x / 32 : 0;
    int bytes = plan.shared_bytes / (plan.split == Split::warps ? kWarps : 1);
    Divisors divisors = normalisers(call.rows.problem, team);
    RowKernel<D> kernel(call.rows, team, rows[warp], Memory{warp * bytes});
    for (int64_t i = team.first_row; i < call.rows.problem.n; i += team.stride) {
      kernel.run(i, divisors);
      team.sync();  // nobody is still reading what the next row overwrites
    }
  } else {
    Team team(call.features.plan, &mailbox, nullptr);
    features::Blocks all(call.features, team, blockIdx.x - call.row_blocks, feature_blocks);
    run_features(all);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&call.features.counters->ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  Team team(call.features.plan, &mailbox, nullptr);
  features::Blocks all(call.features, team, 0, feature_blocks);
  double of_logits = 0;
  for (int64_t i = threadIdx.x; i < call.rows.problem.n; i += kThreads) {
    of_logits += __ldcg(call.rows.problem.totals + i);
  }
  of_logits = all.sum(of_logits);
  double of_features = features::add_up(all);
  if (threadIdx.x == 0) {
    *call.part = static_cast<float>(of_logits);
    *call.loss = static_cast<float>(of_logits + of_features);
  }
}

}  // namespace
#endif

}  // namespace kd::joint
