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
#include "../tensors.h"

extern "C" __attribute__((weak, visibility("default"))) void cblas_gemm_bf16bf16f32(
    int layout, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
    const void* a, int64_t lda, const void* b, int64_t ldb, float beta, float* c, int64_t ldc);

namespace kd {
namespace {

// The sizes are 32-bit integers in MKL's usual interface and 64-bit in its other one. Passed as
// 64-bit ones, small enough, both read the same number; only little-endian x86-64 has MKL.
constexpr int64_t kLargest = INT32_MAX;

struct Operand {
  int transpose;  // CBLAS_TRANSPOSE
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
  if (fits(1, 0)) return {111, leading(1, 0)};
  STD_TORCH_CHECK(fits(0, 1), "kdkernels: ", name, " must have rows or columns of stride 1");
  return {112, leading(0, 1)};
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
  cblas_gemm_bf16bf16f32(101, left.transpose, right.transpose, m, n, k, 1, a.data_ptr(),
                         left.leading, b.data_ptr(), right.leading, accumulate ? 1 : 0,
                         static_cast<float*>(out.data_ptr()), leading);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  if (cblas_gemm_bf16bf16f32 != nullptr) m.impl("mm_float32_", TORCH_BOX(&mm_float32_));
}

}  // namespace kd
