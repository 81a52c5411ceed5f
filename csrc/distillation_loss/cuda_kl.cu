#include "rows.cuh"

namespace kd {

extern const Kernel forward_kl_rows;
extern const Kernel reverse_kl_rows;
extern const Kernel jeffreys_rows;
extern const Kernel tvd_rows;
const Kernel forward_kl_rows = distillation_rows<ForwardKL>;
const Kernel reverse_kl_rows = distillation_rows<ReverseKL>;
const Kernel jeffreys_rows = distillation_rows<Jeffreys>;
const Kernel tvd_rows = distillation_rows<TotalVariation>;

}  // namespace kd
