// Plans and launches of row kernels. Host code; no torch header.
#pragma once

#include <cstdio>
#include <cstring>
#include <mutex>

#include "blocks.cuh"
#include "cuda_status.h"

namespace kd {

struct Device {
  int number = 0, multiprocessors = 0, shared_per_block = 0, shared_per_multiprocessor = 0;
  int max_cluster = 1;  // 1 where the chip has no clusters
};

inline CudaStatus failure(cudaError_t code, const char* kernel, const char* doing,
                          const char* shape) {
  cudaGetLastError();  // reported here: torch's next check is not to find it again
  CudaStatus status;
  status.code = code;
  std::snprintf(status.text, sizeof(status.text), "kdkernels: %s: %s failed: %s (%s)%s", kernel,
                doing, cudaGetErrorString(code), cudaGetErrorName(code), shape);
  return status;
}

#define KD_TRY(call, kernel)                                            \
  do {                                                                  \
    cudaError_t code_ = (call);                                         \
    if (code_ != cudaSuccess) return failure(code_, kernel, #call, ""); \
  } while (0)

// What the current device can hold, asked once per device (static, not inline: an inline function
// has one cache in the whole process, even for libraries of other devices under ptxrun).
static CudaStatus current_device(const char* kernel, Device* out) {
  constexpr int most = 64;
  static std::mutex mutex;
  static Device known[most];
  int number = 0;
  KD_TRY(cudaGetDevice(&number), kernel);
  std::lock_guard<std::mutex> lock(mutex);
  bool keeps = number < most;
  if (keeps && known[number].multiprocessors != 0) {
    *out = known[number];
    return {};
  }
  Device device;
  device.number = number;
  int major = 0, minor = 0;
  auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, number);
  };
  KD_TRY(ask(&device.multiprocessors, cudaDevAttrMultiProcessorCount), kernel);
  KD_TRY(ask(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin), kernel);
  KD_TRY(ask(&device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
         kernel);
  KD_TRY(ask(&major, cudaDevAttrComputeCapabilityMajor), kernel);
  KD_TRY(ask(&minor, cudaDevAttrComputeCapabilityMinor), kernel);
  // sm_120 has clusters of few blocks with little shared memory; a cooperative launch serves it.
  device.max_cluster = major == 9 || major == 10 ? 8 : 1;
  if (keeps) known[number] = device;
  *out = device;
  return {};
}

constexpr int kReserved = 1024;     // what the driver takes of a block
constexpr int kWarpColumns = 1024;  // rows up to this length have a warp each

// How the blocks of a row combine their sums: not at all, in clusters only (no workspace), or in
// clusters where the chip has them and through device memory where it has not.
enum class Meeting { none, clusters, anywhere };

// prefers_kept: a third sweep would compute exponentials and terms again, which is worth a block
// alone on its multiprocessor. raw(slots): bytes of a share as it is staged; kept(slots): with the
// floats that save exponentials.
template <class Raw, class Kept>
Plan plan_rows(const Device& device, int64_t columns, Meeting meeting, bool prefers_kept, Raw raw,
               Kept kept) {
  Plan plan;
  int64_t slots = (columns + kSlot - 1) / kSlot;
  if (columns <= kWarpColumns) {
    plan.split = Split::warps;
    plan.share = plan.tile = static_cast<int>(slots);
    plan.keeps = true;
    plan.shared_bytes = static_cast<int>(kept(slots)) * kWarps;
    return plan;
  }
  bool clusters = device.max_cluster > 1;
  int max_blocks = meeting == Meeting::none || (meeting == Meeting::anywhere && !clusters)
                       ? kMaxBlocks
                       : device.max_cluster;
  // Blocks that wait for each other must all be at rest at once.
  while (!clusters && meeting == Meeting::anywhere && max_blocks > device.multiprocessors) {
    max_blocks /= 2;
  }
  int64_t most = device.shared_per_block - kStaticShared;
  // Two blocks a multiprocessor, so that one computes while the other waits for memory.
  int64_t half = device.shared_per_multiprocessor / 2 - kReserved - kStaticShared;
  auto share_of = [&](int blocks) { return (slots + blocks - 1) / blocks; };
  // The fewest blocks whose shares fit.
  auto fewest = [&](int from, int to, bool keeps, int64_t limit) {
    for (int blocks = from; blocks <= to; blocks *= 2) {
      int64_t share = share_of(blocks);
      if (share < (1 << 20) && (keeps ? kept(share) : raw(share)) <= limit) {
        plan.blocks = blocks;
        plan.share = plan.tile = static_cast<int>(share);
        plan.keeps = keeps;
        return true;
      }
    }
    return false;
  };
  bool found;
  if (clusters || meeting == Meeting::none) {
    // Clusters are cheap: as many blocks as let two rest on a multiprocessor, with the exponentials
    // if possible.
    found = fewest(1, max_blocks, true, half) ||
            (prefers_kept && fewest(1, max_blocks, true, most)) ||
            fewest(1, max_blocks, false, half);
  } else {
    // Blocks that meet in device memory only where one cannot hold the row.
    found =
        fewest(1, 1, true, half) || fewest(1, 1, false, most) || fewest(2, max_blocks, false, half);
  }
  if (!found && !fewest(1, max_blocks, false, most)) {
    // Not even all of them hold the row: tile by tile.
    plan.blocks = max_blocks;
    plan.share = static_cast<int>(share_of(max_blocks));
    plan.tile = 64;
    while (raw(plan.tile + 64) <= half) plan.tile += 64;
  }
  plan.shared_bytes = static_cast<int>(plan.keeps ? kept(plan.tile) : raw(plan.tile));
  plan.split = plan.blocks == 1 || meeting == Meeting::none ? Split::block
               : clusters                                   ? Split::cluster
                                                            : Split::grid;
  return plan;
}

// How many blocks of a kernel rest on a multiprocessor; asked of the runtime once (as
// current_device, static, not inline).
static CudaStatus blocks_at_rest(const char* name, const void* kernel, int bytes,
                                 const Device& device, int* out) {
  struct Known {
    const void* kernel;
    int device, bytes, blocks;
  };
  static std::mutex mutex;
  static Known known[64];  // each where its hash falls, in place of the one before
  std::lock_guard<std::mutex> lock(mutex);
  Known& entry = known[((reinterpret_cast<uint64_t>(kernel) + bytes) / 16 + device.number) % 64];
  if (entry.kernel != kernel || entry.device != device.number || entry.bytes != bytes) {
    // The most that any plan asks for, so that no launch takes it from another.
    KD_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                device.shared_per_block - kStaticShared),
           name);
    int blocks = 0;
    KD_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes), name);
    entry = {kernel, device.number, bytes, blocks};
  }
  *out = entry.blocks;
  return {};
}

// Launches `kernel` with `call`, whose plan it completes with the number of teams.
template <class Call>
CudaStatus launch_rows(const char* name, void (*kernel)(Call), Call call, int64_t rows,
                       const Device& device, cudaStream_t stream) {
  Plan& plan = call.plan;
  const void* function = reinterpret_cast<const void*>(kernel);
  int resident = 0;
  CudaStatus status = blocks_at_rest(name, function, plan.shared_bytes, device, &resident);
  if (status.code != 0) return status;
  int64_t blocks = int64_t(resident > 0 ? resident : 1) * device.multiprocessors;
  if (plan.split == Split::grid && blocks > kMaxTeamBlocks) blocks = kMaxTeamBlocks;
  int64_t per_block = plan.split == Split::warps ? kWarps : 1;
  int64_t teams = blocks / plan.blocks;
  if (teams == 0) teams = 1;
  if (teams * per_block > rows) teams = (rows + per_block - 1) / per_block;
  plan.teams = teams * per_block;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(teams * plan.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (plan.split == Split::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if (plan.split == Split::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = plan.split == Split::cluster || plan.split == Split::grid ? 1 : 0;
  void* arguments[] = {&call};
  cudaError_t code = cudaLaunchKernelExC(&config, function, arguments);
  if (code == cudaSuccess) return {};
  char shape[128];
  std::snprintf(shape, sizeof(shape), "; grid %u, block %d, cluster %d, shared memory %d%s",
                config.gridDim.x, kThreads, plan.split == Split::cluster ? plan.blocks : 1,
                plan.shared_bytes, plan.split == Split::grid ? ", cooperative" : "");
  return failure(code, name, "launch", shape);
}

}  // namespace kd
