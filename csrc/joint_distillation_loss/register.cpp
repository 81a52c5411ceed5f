// joint_distillation_loss on the CPU: rows of logits and pieces of features in one parallel region.
// The schema is in kdkernels/ops/joint_distillation_loss/__init__.py.
#include "../feature_loss/cpu.h"

namespace kd {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <class Real, class FeatureReal>
Result run(const Tensor& student, const Tensor& teacher, const Options& options,
           const features::Arguments& arguments, bool student_grad,
           const std::vector<bool>& wanted) {
  Tensor gradient = student_grad ? fresh_like(student) : empty_gradient(student);
  Forward<Real> forward =
      forward_of<Real>(student, teacher, options, student_grad ? &gradient : nullptr, nullptr);
  Problem<Real>& problem = forward.problem;
  STD_TORCH_CHECK(problem.reduction != Reduction::none,
                  "kdkernels: reduction 'none' is not joint_distillation_loss's");
  check_labels(problem.labels, problem.n, problem.ignore_index, problem.vocab);
  features::Work<FeatureReal> work(arguments, std::nullopt, wanted);
  std::vector<uint8_t> masks(problem.n);
  std::vector<Real> totals(problem.n);
  problem.masks = masks.data();
  problem.totals = totals.data();
  prepare(problem);

  // A column of logits takes about as long as four elements of features.
  int64_t row_cost = 4 * (problem.vocab + 400), rows_cost = problem.n * row_cost;
  auto run_rows = [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Real, float>) {
      kernels().forward_float(problem, begin, end);
    } else {
      kernels().forward_double(problem, begin, end);
    }
  };
  auto row_at = [&](int64_t cost) {
    return cost >= rows_cost ? problem.n : (cost + row_cost - 1) / row_cost;
  };
  torch::stable::parallel_for(0, rows_cost + work.cost(), features::kGrain,
                              [&](int64_t begin, int64_t end) {
                                if (row_at(begin) < row_at(end)) {
                                  run_rows(row_at(begin), row_at(end));
                                }
                                work.run(begin - rows_cost, end - rows_cost);
                              });

  auto [features_loss, feature_parts] = work.finish();
  double logits = 0;
  for (Real total : totals) logits += total;
  constexpr bool wide = sizeof(Real) == 8 || sizeof(FeatureReal) == 8;
  using Wide = std::conditional_t<wide, double, float>;
  auto real = std::make_optional(real_type<Wide>);
  int64_t layers = feature_parts.numel();
  Tensor loss = torch::stable::new_empty(student, std::vector<int64_t>{}, real);
  Tensor parts = torch::stable::new_empty(student, {1 + layers}, real);
  Wide* part = static_cast<Wide*>(parts.data_ptr());
  const FeatureReal* of_layers = static_cast<const FeatureReal*>(feature_parts.data_ptr());
  part[0] = static_cast<Wide>(logits);
  for (int64_t i = 0; i < layers; ++i) part[1 + i] = static_cast<Wide>(of_layers[i]);
  double all = logits + *static_cast<const FeatureReal*>(features_loss.data_ptr());
  *static_cast<Wide*>(loss.data_ptr()) = static_cast<Wide>(all);
  return {loss, forward.rows, parts, gradient, work.gradients};
}

Result joint_distillation_loss(Tensor student, Tensor teacher, KD_OPTIONS, KD_FEATURES,
                               bool student_grad, std::vector<bool> wanted) {
  Options options = KD_TAKE_OPTIONS;
  features::Arguments arguments = KD_TAKE_FEATURES;
  bool wide = is_double(student, teacher), wide_features = features::is_double(arguments);
  auto run_as = wide ? (wide_features ? run<double, double> : run<double, float>)
                     : (wide_features ? run<float, double> : run<float, float>);
  return run_as(student, teacher, options, arguments, student_grad, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("joint_distillation_loss", TORCH_BOX(&joint_distillation_loss));
}

}  // namespace kd
