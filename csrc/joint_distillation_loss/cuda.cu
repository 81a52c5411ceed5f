// The launcher of joint_distillation_loss: how many blocks rows and features get, and the launch.
#include "../distillation_loss/plan.h"
#include "../feature_loss/plan.h"
#include "blocks.cuh"
#include "cuda.h"

namespace kd::joint {

namespace {

constexpr const char* kName = "joint_distillation_loss";

// What a classifier is distilled with. Each further kernel would be 1 MB of machine code and 20 s
// of compilation for each architecture; the other divergences are one launch of each part.
Kernel kernel_of(Divergence divergence) {
  bool known = divergence == Divergence::forward_kl || divergence == Divergence::dkd;
  return known ? joint_blocks<ForwardKL> : nullptr;
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

CudaStatus cuda_prepare(DeviceProblem& problem, int64_t* bytes) {
  CudaStatus status = features::cuda_prepare(problem.features, &problem.features_bytes);
  *bytes = align(problem.features_bytes) + cuda_workspace_bytes();
  return status;
}

CudaStatus cuda_joint(const DeviceProblem& problem, void* workspace, CudaStream stream) {
  const kd::Problem<float>& p = problem.logits;
  if (p.student.dtype == Dtype::float64 || p.teacher.dtype == Dtype::float64) {
    return failure(cudaErrorInvalidValue, kName, "float64 logits", "");
  }
  Device device;
  CudaStatus status = current_device(kName, &device);
  if (status.code != 0) return status;
  Kernel kernel = kernel_of(p.divergence);
  if (kernel == nullptr || p.n == 0) {
    char* behind = static_cast<char*>(workspace) + align(problem.features_bytes);
    status = cuda_forward(p, problem.part, behind, stream);
    if (status.code != 0) return status;
    return features::cuda_feature_loss(problem.features, 0, problem.part, workspace, stream);
  }
  Call call;
  features::fill(call.features, problem.features, 0, nullptr, workspace);
  KD_TRY(cudaMemsetAsync(workspace, 0, sizeof(features::Counters), stream), kName);
  call.rows = {p, {}, nullptr, nullptr, false};
  call.loss = problem.features.loss;
  call.part = problem.part;
  // Blocks that wait for each other are a cooperative launch, in which rows meet in device memory.
  bool waits = call.features.waits;
  if (waits) device.max_cluster = 1;
  Plan& plan = call.rows.plan = plan_call(call.rows, device);
  waits = waits || plan.split == Split::grid;
  Plan& feature_plan = call.features.plan;
  feature_plan.split = Split::block;
  int shared = std::max(plan.shared_bytes, feature_plan.shared_bytes);
  const void* function = reinterpret_cast<const void*>(kernel);
  int resident = 0;
  status = blocks_at_rest(kName, function, shared, device, &resident);
  if (status.code != 0) return status;

  // Blocks at rest, in whole teams of rows; where there is more to do than that, by the bytes to
  // move (a column counts twice: it is computed with more often).
  int64_t most = std::max<int64_t>(resident, 1) * device.multiprocessors;
  if (waits) most = std::min<int64_t>(most, kMaxTeamBlocks);
  int64_t per_block = plan.split == Split::warps ? kWarps : 1;
  int64_t teams = (p.n + per_block - 1) / per_block;
  int64_t pieces = std::max<int64_t>(call.features.pieces, 1);
  int64_t unit = plan.split == Split::cluster ? plan.blocks : 1;
  if (teams * plan.blocks + pieces > most) {
    double of_rows = 2.0 * static_cast<double>(p.n) * static_cast<double>(p.vocab), of_features = 0;
    for (int i = 0; i < call.features.count; ++i) {
      const features::DeviceLayer& l = call.features.layers[i];
      of_features += static_cast<double>(l.samples * l.positions() * l.channels);
    }
    double share = of_rows / (of_rows + of_features + 1);
    int64_t rows_most = static_cast<int64_t>(share * static_cast<double>(most)) / plan.blocks;
    teams = std::min(teams, std::max<int64_t>(rows_most, 1));
    pieces = std::min(pieces, std::max<int64_t>(most - teams * plan.blocks, 1));
  }
  pieces = (pieces + unit - 1) / unit * unit;
  plan.teams = teams * per_block;
  call.row_blocks = static_cast<int>(teams * plan.blocks);
  if (plan.split == Split::grid) {
    char* behind = static_cast<char*>(workspace) + align(problem.features_bytes);
    call.rows.workspace = reinterpret_cast<Workspace*>(behind);
    KD_TRY(cudaMemsetAsync(behind, 0, Workspace::zeroed, stream), kName);
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.row_blocks + pieces));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (plan.split == Split::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if (waits) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = plan.split == Split::cluster || waits ? 1 : 0;
  void* arguments[] = {&call};
  KD_TRY(cudaLaunchKernelExC(&config, function, arguments), kName);
  return features::cuda_feature_loss(problem.features, features::kLayersALaunch,
                                     problem.features.loss, workspace, stream);
}

}  // namespace kd::joint
