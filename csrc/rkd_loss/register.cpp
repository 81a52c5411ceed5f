// The RKD losses on the CPU behind PyTorch's stable ABI: memory, threads, and the sums over rows.
#include <initializer_list>
#include <tuple>

#include "../cpu_level.h"
#include "../tensors.h"
#include "problem.h"

namespace kd::rkd_loss {
namespace {

// Distances are kept up to this many points: two (N, N) matrices, 128 MiB of float32. Each sweep
// computes its rows again above that, in memory of 16 rows a thread.
constexpr int64_t kKept = 4096;

template <class Real>
Points<Real> points_of(const Tensor& x, const char* name) {
  Matrix matrix = matrix_of(x, name);
  STD_TORCH_CHECK(x.scalar_type() == real_type<Real>, "kdkernels: ", name,
                  " must be float32 or float64, and student and teacher of one dtype");
  return {reinterpret_cast<const Real*>(matrix.data), matrix.stride, matrix.columns};
}

template <class Element>
Element* fresh(const Tensor& like, std::initializer_list<int64_t> shape, Tensor& owner) {
  owner = torch::stable::new_empty(like, shape, real_type<Element>);
  return static_cast<Element*>(owner.data_ptr());
}

// rows(problem, begin, end) over `blocks` blocks, of about this many operations each.
template <class Problem, class Function>
void over_blocks(int64_t blocks, int64_t operations, const Problem& problem, Function function) {
  torch::stable::parallel_for(0, blocks, 1 + 100000 / (operations + 1),
                              [&](int64_t begin, int64_t end) { function(problem, begin, end); });
}

double sum_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

using Result = std::tuple<Tensor, Tensor>;

template <class Real, class Kernel>
Result distance_loss(const Tensor& student, const Tensor& teacher, bool grad, Kernel pairs,
                     Kernel means, Kernel losses, Kernel gradient) {
  Distances<Real> p;
  p.student = points_of<Real>(student, "student");
  p.teacher = points_of<Real>(teacher, "teacher");
  int64_t n = p.n = student.size(0);
  int64_t blocks = (n + kRows - 1) / kRows;
  Tensor loss, owner, grads, kept[2];
  Real* result = fresh<Real>(student, {}, loss);
  p.gradient = fresh<Real>(student, {grad ? n : 0, p.student.columns}, grads);
  p.sums = fresh<double>(student, {4, n}, owner);
  int64_t products = kRows * n * (p.student.columns + p.teacher.columns);
  int64_t sweep = kRows * n;
  if (n <= kKept) {
    p.student_distances = fresh<Real>(student, {n, n}, kept[0]);
    p.teacher_distances = fresh<Real>(student, {n, n}, kept[1]);
    over_blocks((blocks + 1) / 2, products, p, pairs);
  } else {
    sweep += products;
  }
  over_blocks(blocks, sweep, p, means);
  double all_pairs = static_cast<double>(n) * static_cast<double>(n - 1);
  for (int64_t k = 0; k < 2; ++k) {
    p.means[k] = all_pairs == 0 ? 0 : sum_of(p.sums + k * n, n) / all_pairs;
  }
  over_blocks(blocks, sweep, p, losses);
  double squared = static_cast<double>(n) * static_cast<double>(n);
  *result = static_cast<Real>(n == 0 ? 0 : sum_of(p.sums + 2 * n, n) / squared);
  if (grad && n > 0) {
    double mean = p.means[0];
    p.common = mean == 0 ? 0 : sum_of(p.sums + 3 * n, n) / (mean * mean * all_pairs);
    over_blocks(blocks, sweep + kRows * n * p.student.columns, p, gradient);
  }
  return {loss, grads};
}

template <class Real, class Kernel>
Result angle_loss(const Tensor& student, const Tensor& teacher, bool grad, Kernel pairs,
                  Kernel losses, Kernel gradient) {
  Angles<Real> p;
  p.student = points_of<Real>(student, "student");
  p.teacher = points_of<Real>(teacher, "teacher");
  int64_t n = p.n = student.size(0);
  int64_t blocks = (n + kRows - 1) / kRows;
  Tensor loss, grads, owners[7];
  Real* result = fresh<Real>(student, {}, loss);
  p.gradient = fresh<Real>(student, {grad ? n : 0, p.student.columns}, grads);
  p.student_squares = fresh<double>(student, {n, n}, owners[0]);
  p.teacher_squares = fresh<double>(student, {n, n}, owners[1]);
  p.student_inverses = fresh<Real>(student, {n, n}, owners[2]);
  p.teacher_inverses = fresh<Real>(student, {n, n}, owners[3]);
  p.sums = fresh<double>(student, {n}, owners[4]);
  p.arms = fresh<Real>(student, {n, n}, owners[5]);
  p.across = fresh<Real>(student, {n, n}, owners[6]);
  over_blocks((blocks + 1) / 2, kRows * n * (p.student.columns + p.teacher.columns), p, pairs);
  over_blocks(blocks, kRows * n * n, p, losses);
  double cubed = static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  *result = static_cast<Real>(n == 0 ? 0 : sum_of(p.sums, n) / cubed);
  if (grad) over_blocks(blocks, kRows * n * p.student.columns, p, gradient);
  return {loss, grads};
}

Result distance(Tensor student, Tensor teacher, bool grad) {
  const Kernels& k = KD_AT_CPU_LEVEL(kernels);
  if (dtype_of(student) == Dtype::float64) {
    return distance_loss<double>(student, teacher, grad, k.distance_pairs_double,
                                 k.distance_means_double, k.distance_losses_double,
                                 k.distance_gradient_double);
  }
  return distance_loss<float>(student, teacher, grad, k.distance_pairs_float,
                              k.distance_means_float, k.distance_losses_float,
                              k.distance_gradient_float);
}

Result angle(Tensor student, Tensor teacher, bool grad) {
  const Kernels& k = KD_AT_CPU_LEVEL(kernels);
  if (dtype_of(student) == Dtype::float64) {
    return angle_loss<double>(student, teacher, grad, k.angle_pairs_double, k.angle_losses_double,
                              k.angle_gradient_double);
  }
  return angle_loss<float>(student, teacher, grad, k.angle_pairs_float, k.angle_losses_float,
                           k.angle_gradient_float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rkd_distance_loss", TORCH_BOX(&distance));
  m.impl("rkd_angle_loss", TORCH_BOX(&angle));
}

}  // namespace kd::rkd_loss
