// The CUDA launchers as C functions, for tests/emulate.py, which lays out Problem<float> itself.
#include "distillation_loss/cuda.h"
#include "logit_rows/cuda.h"
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
KD_EXPORT int kd_moments(const kd::Matrix* x, int64_t n, int64_t vocab, float* out, char* text) {
  return report(kd::logit_rows::cuda_moments(*x, n, vocab, out, nullptr), text);
}
KD_EXPORT int kd_add_centered(const kd::Matrix* grad, const kd::Matrix* x, const float* mean,
                              const float* factor, int64_t n, int64_t vocab, char* text) {
  kd::logit_rows::Centered<float> problem{vocab, *grad, *x, mean, factor};
  return report(kd::logit_rows::cuda_add_centered(problem, n, nullptr), text);
}
KD_EXPORT int kd_temperature_sums(const kd::Problem<float>* problem, float* out, char* text) {
  return report(kd::logit_rows::cuda_temperature_sums(*problem, out, nullptr), text);
}
KD_EXPORT int kd_adaptive_weights(const kd::Matrix* student, const kd::Matrix* teacher,
                                  const kd::Parameter<float>* temperature,
                                  const kd::Parameter<float>* teacher_temperature, int64_t n,
                                  int64_t vocab, float* out, char* text) {
  kd::logit_rows::Adaptive<float> problem{
      vocab, *student, *teacher, *temperature, *teacher_temperature, out};
  return report(kd::logit_rows::cuda_adaptive_weights(problem, n, nullptr), text);
}
