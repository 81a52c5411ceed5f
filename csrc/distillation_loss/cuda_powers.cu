#include "rows.cuh"

namespace kd {

extern const Kernel alpha_rows;
extern const Kernel renyi_rows;
extern const Kernel ab_rows;
const Kernel alpha_rows = distillation_rows<Alpha>;
const Kernel renyi_rows = distillation_rows<Renyi>;
const Kernel ab_rows = distillation_rows<AlphaBeta>;

}  // namespace kd
