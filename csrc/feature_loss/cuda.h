// The CUDA launchers of feature_loss: device pointers in the problem, work queued on the stream of
// the current device, nothing allocated, no wait.
#pragma once

#include <vector>

#include "../cuda_status.h"
#include "problem.h"

namespace kd::features {

// A layer, and how blocks share it. A piece is a matrix whose columns are neighbours in memory:
// positions × channels (`along`, the channels being the columns) or channels × positions.
struct DeviceLayer : Layer<float> {
  double weight = 1;          // the weights' tensor, where there is one, in its place
  bool divides = false;       // by a sum of mask weights, found on the device
  bool of_samples = false;    // that sum: of the samples' mean weights
  double divisor_factor = 1;  // what it is multiplied by
  bool along = false;         // channels are the columns
  bool wide = false;          // 16 bytes at a time, everywhere
  bool keeps = false;         // what a thread reads twice stays in shared memory
  int lanes = 1;              // threads of a row
  int64_t pieces_a_sample = 0;
  Feature variance, variance_gradient;  // of (channels); no data where there is none
  float* maps = nullptr;   // Metric::attention: of the students' samples, then of the teachers'
  float* stats = nullptr;  // kStats a sample
};

// What the layer is divided by, as far as that is known before its mask is read. channels: of the
// feature (merged ones are gone from the layer).
inline void set_divisor(DeviceLayer& l, Metric metric, Reduction reduction, int64_t channels) {
  bool divides = reduction == Reduction::batchmean || reduction == Reduction::mean;
  bool of_maps = metric == Metric::attention, of_positions = of_maps || metric == Metric::cosine;
  l.divides = divides && l.mask != nullptr;
  l.of_samples = of_maps && reduction == Reduction::batchmean;
  bool of_elements = reduction == Reduction::mean && !of_positions;
  l.divisor_factor = of_elements ? static_cast<double>(channels) : 1;
  int64_t positions = l.positions() * l.channels / channels;
  int64_t units = l.samples * (l.of_samples ? positions > 0 : positions);
  l.divisor = divides && units > 0 ? static_cast<double>(units) * l.divisor_factor : 1;
}

struct DeviceProblem {
  std::vector<DeviceLayer> layers;
  Metric metric = Metric::l2;
  bool normalize = false;
  float beta = 1;
  Reduction reduction = Reduction::batchmean;
  const float* weights = nullptr;
  const float* upstream = nullptr;
  int64_t upstream_stride = 0;
  float* loss = nullptr;
  float* parts = nullptr;
  int shared_bytes = 0;  // this and the layers' division: cuda_prepare
};

// Divides the layers among blocks; returns the bytes of device memory that the call needs beside
// its results, which need not be cleared.
CudaStatus cuda_prepare(DeviceProblem& problem, int64_t* bytes);
// The layers from `first` on, one launch for every kLayersALaunch of them. Where `base` is not null
// the loss is that of these layers and *base.
constexpr int kLayersALaunch = 32;
CudaStatus cuda_feature_loss(const DeviceProblem& problem, int first, const float* base,
                             void* workspace, CudaStream stream);

// Dense tensors times a factor, in place, left alone where it is 1. One launch for every
// kGradsALaunch of them.
struct Flat {
  char* data;
  Dtype dtype;
  int64_t n;
};
constexpr int kGradsALaunch = 64;
CudaStatus cuda_scale_features(const std::vector<Flat>& grads, const float* factor,
                               CudaStream stream);

}  // namespace kd::features
