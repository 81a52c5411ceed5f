// The functions of logit_rows on the CPU behind PyTorch's stable ABI: checks, threads.
#include "../cpu_level.h"
#include "ops.h"

namespace kd::logit_rows {

template <>
const Kernels<float>& kernels<float>() {
  return KD_AT_CPU_LEVEL(kernels).of_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return KD_AT_CPU_LEVEL(kernels).of_double;
}

namespace {

template <class Real, class Rows>
void run(int64_t n, int64_t columns, Rows rows) {
  torch::stable::parallel_for(0, n, grain(columns), rows);
}

Tensor row_moments(Tensor x, int64_t vocab_size) {
  Matrix matrix = checked(x, "x", vocab_size);
  int64_t n = x.size(0);
  auto moments_as = [&](auto real) {
    using Real = decltype(real);
    Tensor out = torch::stable::new_empty(x, {2, n}, real_type<Real>);
    Real* data = static_cast<Real*>(out.data_ptr());
    run<Real>(n, vocab_size, [&](int64_t begin, int64_t end) {
      kernels<Real>().moments(matrix, vocab_size, data, n, begin, end);
    });
    return out;
  };
  return dtype_of(x) == Dtype::float64 ? moments_as(double()) : moments_as(float());
}

void add_centered_(Tensor grad, Tensor x, Tensor mean, Tensor factor, int64_t vocab_size) {
  auto add_as = [&](auto real) {
    using Real = decltype(real);
    auto problem = centered_of<Real>(grad, x, mean, factor, vocab_size);
    run<Real>(x.size(0), vocab_size, [&](int64_t begin, int64_t end) {
      kernels<Real>().add_centered(problem, begin, end);
    });
  };
  dtype_of(factor) == Dtype::float64 ? add_as(double()) : add_as(float());
}

Tensor temperature_sums(Tensor student, Tensor teacher, Tensor rows, OptionalTensor labels,
                        std::string divergence, int64_t vocab_size) {
  auto sums_as = [&](auto real) {
    using Real = decltype(real);
    auto problem = sums_of<Real>(student, teacher, rows, labels, divergence, vocab_size);
    Tensor out = torch::stable::new_empty(student, {3, problem.n}, real_type<Real>);
    Real* data = static_cast<Real*>(out.data_ptr());
    run<Real>(problem.n, vocab_size, [&](int64_t begin, int64_t end) {
      kernels<Real>().temperature_sums(problem, data, begin, end);
    });
    return out;
  };
  return dtype_of(rows) == Dtype::float64 ? sums_as(double()) : sums_as(float());
}

Tensor adaptive_weights(Tensor student, Tensor teacher, Tensor temperature,
                        Tensor teacher_temperature, int64_t vocab_size) {
  auto weights_as = [&](auto real) {
    using Real = decltype(real);
    auto [problem, out] =
        adaptive_of<Real>(student, teacher, temperature, teacher_temperature, vocab_size);
    // About three times what a loss costs a row.
    run<Real>(student.size(0), 3 * vocab_size, [&, p = problem](int64_t begin, int64_t end) {
      kernels<Real>().adaptive_weights(p, begin, end);
    });
    return out;
  };
  return dtype_of(temperature) == Dtype::float64 ? weights_as(double()) : weights_as(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row_moments", TORCH_BOX(&row_moments));
  m.impl("add_centered_", TORCH_BOX(&add_centered_));
  m.impl("temperature_sums", TORCH_BOX(&temperature_sums));
  m.impl("adaptive_weights", TORCH_BOX(&adaptive_weights));
}

}  // namespace kd::logit_rows
