// The CUDA launchers as C functions, for tests/emulate.py, which lays out Problem<float> itself.
#include "distillation_loss/cuda.h"
#include "softmax/cuda.h"

#define KD_EXPORT extern "C" __attribute__((visibility("default")))

static int report(const kd::CudaStatus& status, char* text) {
  memcpy(text, status.text, sizeof(status.text));
  return status.code;
}

KD_EXPORT int64_t kd_problem_bytes() { return sizeof(kd::Problem<float>); }
KD_EXPORT int64_t kd_softmax_problem_bytes() { return sizeof(kd::softmax::Problem<float>); }
KD_EXPORT int64_t kd_workspace_bytes() { return kd::cuda_workspace_bytes(); }
KD_EXPORT int kd_forward(const kd::Problem<float>* problem, float* loss, void* workspace,
                         char* text) {
  return report(kd::cuda_forward(*problem, loss, workspace, nullptr), text);
}
KD_EXPORT int kd_backward(const kd::Problem<float>* problem, char* text) {
  return report(kd::cuda_backward(*problem, nullptr), text);
}
KD_EXPORT int kd_scale_rows(const kd::Matrix* matrix, int64_t n, const float* factor,
                            int64_t stride, char* text) {
  return report(kd::cuda_scale_rows(*matrix, n, factor, stride, nullptr), text);
}
KD_EXPORT int kd_softmax(const kd::softmax::Problem<float>* problem, int64_t n, char* text) {
  return report(kd::softmax::cuda_forward(*problem, n, nullptr), text);
}
KD_EXPORT int kd_softmax_backward(const kd::softmax::Problem<float>* problem, int64_t n,
                                  char* text) {
  return report(kd::softmax::cuda_backward(*problem, n, nullptr), text);
}
