// What the registered CUDA functions share: checks of where tensors lie, the stream, and errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <utility>

#include "cuda_status.h"
#include "tensors.h"

namespace kd {

using torch::stable::accelerator::DeviceGuard;

// The dispatcher comes here as soon as one argument is a CUDA tensor.
inline void check_device(const Tensor& first, const char* first_name,
                         std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
  STD_TORCH_CHECK(first.is_cuda(), "kdkernels: ", first_name,
                  " is not on a CUDA device; accepted: every tensor on the same one");
  for (const auto& [name, tensor] : others) {
    STD_TORCH_CHECK(!tensor || (tensor->is_cuda() && tensor->get_device() == first.get_device()),
                    "kdkernels: ", name, " is not on ", first_name, "'s CUDA device ",
                    first.get_device());
  }
}

inline void refuse_float64(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(dtype_of(tensor) != Dtype::float64, "kdkernels: ", name,
                  " has dtype float64, which the CUDA library does not serve; accepted: float32, "
                  "bfloat16, float16, or backend='reference'");
}

// PyTorch's current stream on the tensor's device.
inline CudaStream stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) == 0,
                  "kdkernels: torch does not tell the current CUDA stream");
  return static_cast<CudaStream>(stream);
}

inline void check(const CudaStatus& status) { STD_TORCH_CHECK(status.code == 0, status.text); }

}  // namespace kd
