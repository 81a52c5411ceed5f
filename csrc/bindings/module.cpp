// The row kernels without torch, on NumPy arrays, at any CPU level that this machine has: a module
// of the tests, built by tests/sanitize/build.py. It checks shapes and dtypes as far as a test's
// own mistake would look like a kernel's.
//
// One translation unit, because pybind11's headers take 6 s to compile.
#define KD_TARGET
#include "../rows.h"
#include "arrays.h"
#include "distillation_loss.h"
#include "feature_loss.h"
#include "kl_div.h"
#include "softmax.h"

PYBIND11_MODULE(row_kernels, m) {
  using namespace kd::bindings;
  std::vector<std::string> levels{"baseline"};
  if (kd::cpu_level() >= kd::avx2) levels.push_back("avx2");
  if (kd::cpu_level() >= kd::avx512) levels.push_back("avx512");
  m.attr("levels") = levels;
  m.attr("block") = kd::kBlock;
  bind(m.def_submodule("distillation_loss"));
  kd::features::bind(m.def_submodule("feature_loss"));
  kd::softmax::bind(m.def_submodule("softmax"));
  kd::kl_div::bind(m.def_submodule("kl_div"));
}
