// How distillation_loss's rows are shared out among CUDA blocks. Host code, for its own launcher
// and joint_distillation_loss's.
#pragma once

#include "../launch.cuh"
#include "rows.cuh"

namespace kd {

inline Plan plan_call(const Call& call, const Device& device) {
  const Problem<float>& p = call.problem;
  int64_t s = size_of(p.student.dtype), t = size_of(p.teacher.dtype);
  auto raw = [=](int64_t slots) -> int64_t {
    return area_bytes(static_cast<int>(slots), s) + area_bytes(static_cast<int>(slots), t);
  };
  bool backward = call.backward;
  // What is kept saves exponentials in a forward; a backward computes each once anyway.
  auto kept = [=](int64_t slots) {
    return raw(slots) + (backward ? 0 : 4 * plane_bytes(static_cast<int>(slots)));
  };
  bool third_sweep = !backward && p.student_grad.data && !p.teacher_grad.data &&
                     p.divergence != Divergence::forward_kl;
  Plan plan = plan_rows(device, p.vocab, backward ? Meeting::none : Meeting::anywhere, third_sweep,
                        raw, kept);
  if (backward) plan.keeps = false;
  return plan;
}

}  // namespace kd
