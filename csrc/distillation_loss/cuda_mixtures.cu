#include "rows.cuh"

namespace kd {

extern const Kernel jsd_rows;
extern const Kernel skew_forward_kl_rows;
extern const Kernel skew_reverse_kl_rows;
const Kernel jsd_rows = distillation_rows<JSD>;
const Kernel skew_forward_kl_rows = distillation_rows<SkewForwardKL>;
const Kernel skew_reverse_kl_rows = distillation_rows<SkewReverseKL>;

}  // namespace kd
