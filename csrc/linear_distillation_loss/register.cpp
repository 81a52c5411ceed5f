// mm_float32_ on the CPU: bfloat16 matrices, float32 products and sums.
//
// torch.mm of bfloat16 rounds its result to bfloat16 and has no out_dtype on the CPU. MKL has the
// product that is needed, libtorch_cpu exports it (a documented oneMKL function, which torch itself
// calls), and linking weakly to it needs no MKL of ours: where a torch has none the symbol is null,
// nothing is registered, and the dispatcher goes to the plain torch of reference.py.
//
// Measured (2 cores with AMX, torch 2.13, ms for 256 rows, H = 576, V = 49152, alternately):
// bfloat16 torch.mm 29, this 44, float32 torch.mm 123, and oneDNN's fpmath mode, which would be a
// global setting changed behind other threads' backs, 37. Summing into float32 costs nothing
// besides: the weight gradient 33, against 32 for the bfloat16 torch.mm.
#include "../distillation_loss/problem.h"
#include "../tensors.h"
#include "amx.h"

extern "C" __attribute__((weak, visibility("default"))) void cblas_gemm_bf16bf16f32(
    int layout, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
    const void* a, int64_t lda, const void* b, int64_t ldb, float beta, float* c, int64_t ldc);

namespace kd {
namespace {

// The sizes are 32-bit integers in MKL's usual interface and 64-bit in its other one. Passed as
// 64-bit ones, small enough, both read the same number; only little-endian x86-64 has MKL.
constexpr int64_t kLargest = INT32_MAX;

constexpr int kAsItIs = 111, kTransposed = 112;  // CBLAS_TRANSPOSE

struct Operand {
  int transpose;
  int64_t leading;
};

Operand operand_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && dtype_of(x) == Dtype::bfloat16, "kdkernels: ", name,
                  " must be a bfloat16 matrix");
  auto fits = [&](int64_t inner, int64_t outer) {
    return (x.size(inner) <= 1 || x.stride(inner) == 1) &&
           (x.size(outer) <= 1 || x.stride(outer) >= x.size(inner));
  };
  auto leading = [&](int64_t inner, int64_t outer) {
    int64_t least = x.size(inner) > 1 ? x.size(inner) : 1;
    return x.size(outer) <= 1 ? least : x.stride(outer);
  };
  if (fits(1, 0)) return {kAsItIs, leading(1, 0)};
  STD_TORCH_CHECK(fits(0, 1), "kdkernels: ", name, " must have rows or columns of stride 1");
  return {kTransposed, leading(0, 1)};
}

// out (m, n) = a (m, k) · b (k, n), or out += that.
void mm_float32_(Tensor out, Tensor a, Tensor b, bool accumulate) {
  Operand left = operand_of(a, "a"), right = operand_of(b, "b");
  Matrix result = matrix_of(out, "out");
  int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  STD_TORCH_CHECK(result.dtype == Dtype::float32 && out.size(0) == m && out.size(1) == n &&
                      b.size(0) == k && (m <= 1 || out.stride(0) >= n),
                  "kdkernels: out must be a float32 matrix of a's rows and b's columns");
  int64_t leading = m <= 1 ? (n > 1 ? n : 1) : out.stride(0);
  for (int64_t size : {m, n, k, left.leading, right.leading, leading}) {
    STD_TORCH_CHECK(size <= kLargest, "kdkernels: a matrix of mm_float32_ is too large");
  }
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (!accumulate) torch::stable::fill_(out, 0);
    return;
  }
  if (has_amx() && !accumulate && left.transpose == kAsItIs && right.transpose == kTransposed) {
    const auto* weight = static_cast<const uint16_t*>(b.data_ptr());
    auto* logits = static_cast<float*>(out.data_ptr());
    AmxHidden hidden(static_cast<const uint16_t*>(a.data_ptr()), left.leading, m, k);
    constexpr int64_t kPanel = AmxHidden::kPanel;
    torch::stable::parallel_for(0, (n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
      int64_t last = end * kPanel < n ? end * kPanel : n;
      hidden.logits(weight, right.leading, logits, leading, begin * kPanel, last);
    });
    return;
  }
  cblas_gemm_bf16bf16f32(101, left.transpose, right.transpose, m, n, k, 1, a.data_ptr(),
                         left.leading, b.data_ptr(), right.leading, accumulate ? 1 : 0,
                         static_cast<float*>(out.data_ptr()), leading);
}

// A kept gradient times the upstream factor, rounded once: torch.mul into another dtype makes a
// whole temporary.
Tensor scaled(Tensor grad, Tensor factor, ScalarType dtype) {
  Tensor from = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  Tensor result = fresh_like(from, dtype);
  int64_t rows = from.dim() == 2 ? from.size(0) : 1;
  int64_t columns = rows > 0 ? from.numel() / rows : 0;
  auto matrix = [&](const Tensor& x) {
    return Matrix{static_cast<char*>(x.data_ptr()), dtype_of(x), columns, columns};
  };
  bool doubles = dtype_of(factor) == Dtype::float64;
  STD_TORCH_CHECK(factor.numel() == 1 && (doubles || dtype_of(from) != Dtype::float64),
                  "kdkernels: factor must be one number, float64 where grad is");
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    if (doubles) {
      kernels().scale_double(matrix(from), matrix(result), reals<double>(factor, "factor", 1), 0,
                             begin, end);
    } else {
      kernels().scale_float(matrix(from), matrix(result), reals<float>(factor, "factor", 1), 0,
                            begin, end);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("scaled", TORCH_BOX(&scaled));
  if (cblas_gemm_bf16bf16f32 != nullptr) m.impl("mm_float32_", TORCH_BOX(&mm_float32_));
}

}  // namespace kd
