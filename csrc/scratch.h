// Working memory of the row kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kd {

// Per-thread memory that outlives the call: allocating it anew costs a page fault per 4 KiB, 60 µs
// for a row of 128k.
template <class Real>
struct Scratch {
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  std::unique_ptr<Real, Free> memory;
  int64_t size = 0;

  Real* get(int64_t wanted) {
    if (wanted > size) {
      memory.reset();
      size = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 64, wanted * sizeof(Real)) != 0) throw std::bad_alloc();
      memory.reset(static_cast<Real*>(p));
      size = wanted;
    }
    return memory.get();
  }
};

}  // namespace kd
