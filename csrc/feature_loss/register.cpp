// feature_loss on the CPU behind PyTorch's stable ABI.
#include "cpu.h"

namespace kd::features {
namespace {

template <class Real>
std::tuple<Tensor, Tensor, std::vector<Tensor>> run(const Arguments& arguments,
                                                    const OptionalTensor& upstream,
                                                    const std::vector<bool>& wanted) {
  Work<Real> work(arguments, upstream, wanted);
  torch::stable::parallel_for(0, work.cost(), kGrain,
                              [&](int64_t begin, int64_t end) { work.run(begin, end); });
  auto [loss, parts] = work.finish();
  return {loss, parts, work.gradients};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> feature_loss(KD_FEATURES, OptionalTensor upstream,
                                                             std::vector<bool> wanted) {
  Arguments arguments = KD_TAKE_FEATURES;
  return is_double(arguments) ? run<double>(arguments, upstream, wanted)
                              : run<float>(arguments, upstream, wanted);
}

// Gradients are dense: whatever their strides, their memory is one block.
void scale_features_(std::vector<Tensor> grads, Tensor factor) {
  constexpr int64_t columns = 16384;
  for (const Tensor& grad : grads) {
    char* data = static_cast<char*>(grad.data_ptr());
    int64_t n = grad.numel(), rows = n / columns, rest = n % columns;
    Matrix matrix{data, dtype_of(grad), columns, columns};
    Matrix last{matrix.row(rows), matrix.dtype, columns, rest};
    auto scale = [&](const Matrix& m, int64_t begin, int64_t end) {
      if (dtype_of(factor) == Dtype::float64) {
        kd::kernels().scale_double(m, m, static_cast<const double*>(factor.data_ptr()), 0, begin,
                                   end);
      } else {
        kd::kernels().scale_float(m, m, reals<float>(factor, "factor", 1), 0, begin, end);
      }
    };
    torch::stable::parallel_for(0, rows, 4,
                                [&](int64_t begin, int64_t end) { scale(matrix, begin, end); });
    if (rest > 0) scale(last, 0, 1);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("feature_loss", TORCH_BOX(&feature_loss));
  m.impl("scale_features_", TORCH_BOX(&scale_features_));
}

}  // namespace kd::features
