// The CUDA launchers of feature_loss and joint_distillation_loss as C functions, for
// tests/emulate_features.py.
#include <cstring>

#include "feature_loss/cuda.h"
#include "joint_distillation_loss/cuda.h"

#define KD_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace kd::features;

struct GivenFeature {
  char* data;
  int64_t dtype, strides[6];  // sample, outer, inner, channel
};
struct GivenLayer {
  int64_t sizes[7];  // samples, outer, inner, channels, the teacher's channels
  GivenFeature student, teacher, gradient, mask, variance, variance_gradient;
  double weight;
  int64_t channels;  // of the feature
};
struct GivenProblem {
  int64_t layers, metric, normalize, reduction, upstream_stride;
  double beta;
  const GivenLayer* given;
  const float *weights, *upstream;
  float *loss, *parts;
};

Strides strides(const int64_t (&s)[6]) { return {s[0], {s[1], s[2], s[3]}, s[4], s[5]}; }
Feature feature(const GivenFeature& f) {
  if (f.data == nullptr) return {};
  return {f.data, static_cast<kd::Dtype>(f.dtype), strides(f.strides)};
}

DeviceProblem problem_of(const GivenProblem& given) {
  DeviceProblem p;
  p.metric = static_cast<Metric>(given.metric);
  p.normalize = given.normalize != 0;
  p.beta = static_cast<float>(given.beta);
  p.reduction = static_cast<kd::Reduction>(given.reduction);
  p.weights = given.weights;
  p.upstream = given.upstream;
  p.upstream_stride = given.upstream_stride;
  p.loss = given.loss;
  p.parts = given.parts;
  int64_t units = 0;
  for (int64_t i = 0; i < given.layers; ++i) {
    const GivenLayer& g = given.given[i];
    DeviceLayer l;
    l.samples = g.sizes[0];
    for (int k = 0; k < kOuter; ++k) l.outer[k] = g.sizes[1 + k];
    l.inner = g.sizes[4];
    l.channels = g.sizes[5];
    l.teacher_channels = g.sizes[6];
    l.student = feature(g.student);
    l.teacher = feature(g.teacher);
    l.gradient = feature(g.gradient);
    l.mask = reinterpret_cast<const float*>(g.mask.data);
    l.mask_strides = strides(g.mask.strides);
    l.variance = feature(g.variance);
    l.variance_gradient = feature(g.variance_gradient);
    l.weight = g.weight;
    l.first_unit = units;
    units += l.samples;
    set_divisor(l, p.metric, p.reduction, g.channels);
    p.layers.push_back(l);
  }
  return p;
}

int report(const kd::CudaStatus& status, char* text) {
  std::memcpy(text, status.text, sizeof(status.text));
  return status.code;
}

}  // namespace

KD_EXPORT int64_t kd_layer_bytes() { return sizeof(GivenLayer); }
KD_EXPORT int64_t kd_logits_bytes() { return sizeof(kd::Problem<float>); }
KD_EXPORT int kd_feature_workspace(const GivenProblem* given, int64_t* bytes, char* text) {
  DeviceProblem problem = problem_of(*given);
  return report(cuda_prepare(problem, bytes), text);
}
KD_EXPORT int kd_feature_loss(const GivenProblem* given, void* workspace, char* text) {
  DeviceProblem problem = problem_of(*given);
  int64_t bytes = 0;
  kd::CudaStatus status = cuda_prepare(problem, &bytes);
  if (status.code == 0) status = cuda_feature_loss(problem, 0, nullptr, workspace, nullptr);
  return report(status, text);
}
KD_EXPORT int kd_scale_features(int64_t n, char* const* data, const int64_t* dtypes,
                                const int64_t* sizes, const float* factor, char* text) {
  std::vector<Flat> grads;
  for (int64_t i = 0; i < n; ++i) {
    grads.push_back({data[i], static_cast<kd::Dtype>(dtypes[i]), sizes[i]});
  }
  return report(cuda_scale_features(grads, factor, nullptr), text);
}
KD_EXPORT int kd_joint(const kd::Problem<float>* logits, const GivenProblem* given, float* part,
                       int64_t* bytes, void* workspace, char* text) {
  kd::joint::DeviceProblem problem{*logits, problem_of(*given), part};
  kd::CudaStatus status = kd::joint::cuda_prepare(problem, bytes);
  if (status.code == 0 && workspace) status = cuda_joint(problem, workspace, nullptr);
  return report(status, text);
}
