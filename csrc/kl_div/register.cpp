// kl_div on the CPU behind PyTorch's stable ABI: checks, allocation, threads. The schemas and what
// every argument means are in kdkernels/ops/kl_div/__init__.py.
#include <tuple>
#include <vector>

#include "../cpu_level.h"
#include "../tensors.h"
#include "problem.h"

namespace kd::kl_div {
namespace {

Operand operand_of(const Tensor& tensor) {
  Operand operand;
  operand.data = static_cast<const char*>(tensor.data_ptr());
  operand.dtype = dtype_of(tensor);
  for (int64_t d = 0; d < tensor.dim(); ++d) operand.strides.push_back(tensor.stride(d));
  return operand;
}

Output output_of(Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor)};
}

// Drops dimensions of size 1 and merges neighbours that lie in every operand as one.
void merge_dimensions(std::vector<int64_t>& sizes, const std::vector<Operand*>& operands) {
  std::vector<int64_t> merged;
  std::vector<std::vector<int64_t>> strides(operands.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    bool joins = !merged.empty();
    for (size_t k = 0; k < operands.size() && joins; ++k) {
      joins = strides[k].back() == operands[k]->strides[d] * sizes[d];
    }
    if (joins) {
      merged.back() *= sizes[d];
    } else {
      merged.push_back(sizes[d]);
    }
    for (size_t k = 0; k < operands.size(); ++k) {
      if (!joins) strides[k].push_back(0);
      strides[k].back() = operands[k]->strides[d];
    }
  }
  if (merged.empty()) {  // one element
    merged.push_back(1);
    for (auto& own : strides) own.push_back(1);
  }
  sizes = merged;
  for (size_t k = 0; k < operands.size(); ++k) operands[k]->strides = strides[k];
}

void check_shape(const Tensor& tensor, const Tensor& input, const char* name) {
  bool same = tensor.dim() == input.dim();
  for (int64_t d = 0; d < input.dim() && same; ++d) same = tensor.size(d) == input.size(d);
  STD_TORCH_CHECK(same, "kdkernels: ", name, " must have input's shape");
}

Problem problem_of(const Tensor& input, const Tensor& target, bool log_target) {
  check_shape(target, input, "target");
  Problem problem;
  problem.numel = input.numel();
  for (int64_t d = 0; d < input.dim(); ++d) problem.sizes.push_back(input.size(d));
  problem.input = operand_of(input);
  problem.target = operand_of(target);
  problem.log_target = log_target;
  return problem;
}

bool is_double(const Problem& problem) {
  return problem.input.dtype == Dtype::float64 || problem.target.dtype == Dtype::float64;
}

int64_t tasks_of(const Problem& problem) { return (problem.numel + kTask - 1) / kTask; }

void run_forward(Problem& problem) {
  merge_dimensions(problem.sizes, {&problem.input, &problem.target});
  const Kernels& table = KD_AT_CPU_LEVEL(kernels);
  auto tasks = is_double(problem) ? table.forward_double : table.forward_float;
  torch::stable::parallel_for(0, tasks_of(problem), 1,
                              [&](int64_t begin, int64_t end) { tasks(problem, begin, end); });
}

Tensor terms(Tensor input, Tensor target, bool log_target) {
  Problem problem = problem_of(input, target, log_target);
  ScalarType widest = input.scalar_type();
  if (widest != target.scalar_type()) {
    widest = is_double(problem) ? ScalarType::Double : ScalarType::Float;
  }
  Tensor result = fresh_like(input, widest);
  problem.terms = output_of(result);
  if (problem.numel > 0) run_forward(problem);
  return result;
}

Tensor sum(Tensor input, Tensor target, bool log_target) {
  Problem problem = problem_of(input, target, log_target);
  std::vector<double> sums(tasks_of(problem));
  problem.sums = sums.data();
  if (problem.numel > 0) run_forward(problem);
  double total = 0;
  for (double one : sums) total += one;
  bool wide = is_double(problem);
  Tensor result = torch::stable::new_empty(input, std::vector<int64_t>{},
                                           wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *static_cast<double*>(result.data_ptr()) = total;
  } else {
    *static_cast<float*>(result.data_ptr()) = static_cast<float>(total);
  }
  return result;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor input, Tensor target, bool log_target,
                                    bool input_grad, bool target_grad) {
  Problem problem = problem_of(input, target, log_target);
  check_shape(grad, input, "grad");
  problem.upstream = operand_of(grad);
  Tensor gx = input_grad ? fresh_like(input) : torch::stable::new_empty(input, {0});
  Tensor gt = target_grad ? fresh_like(target) : torch::stable::new_empty(target, {0});
  if (input_grad) problem.input_grad = output_of(gx);
  if (target_grad) problem.target_grad = output_of(gt);
  if (problem.numel == 0) return {gx, gt};
  merge_dimensions(problem.sizes, {&problem.input, &problem.target, &problem.upstream});
  const Kernels& table = KD_AT_CPU_LEVEL(kernels);
  auto tasks = is_double(problem) ? table.backward_double : table.backward_float;
  torch::stable::parallel_for(0, tasks_of(problem), 1,
                              [&](int64_t begin, int64_t end) { tasks(problem, begin, end); });
  return {gx, gt};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kl_div", TORCH_BOX(&terms));
  m.impl("kl_div_sum", TORCH_BOX(&sum));
  m.impl("kl_div_backward", TORCH_BOX(&backward));
}

}  // namespace kd::kl_div
