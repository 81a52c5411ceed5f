// KD_INLINE: on the host always inlined (elementary.h says why), under nvcc for host and device.
#pragma once

#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif
