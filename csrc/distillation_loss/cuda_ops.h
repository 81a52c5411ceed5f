// What a forward of distillation_loss on CUDA, alone or in joint_distillation_loss, checks.
#pragma once

#include "../cuda_tensors.h"
#include "ops.h"

namespace kd {

inline void check_forward(const Tensor& student, const Tensor& teacher, const Options& o) {
  check_device(student, "student",
               {{"teacher", teacher},
                {"labels", o.labels},
                {"token_weights", o.token_weights},
                {"first", o.first_tensor},
                {"second", o.second_tensor},
                {"temperature", o.temperature_tensor},
                {"teacher_temperature", o.teacher_temperature_tensor},
                {"kd_weight", o.kd_weight_tensor},
                {"ce_weight", o.ce_weight_tensor},
                {"z_loss_weight", o.z_loss_weight_tensor},
                {"normalizer", o.normalizer_tensor}});
  refuse_float64(student, "student");
  refuse_float64(teacher, "teacher");
}

}  // namespace kd
