// What the CUDA launchers return. No CUDA and no torch header: the files that register the kernels
// include this.
#pragma once

struct CUstream_st;

namespace kd {

using CudaStream = CUstream_st*;  // cudaStream_t

// code 0, or a cudaError_t and a text that names the kernel and its launch shape.
struct CudaStatus {
  int code = 0;
  char text[256] = {};
};

}  // namespace kd
