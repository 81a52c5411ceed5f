// softmax and log_softmax on CUDA; as csrc/softmax/kernels.h, with a row's share in shared memory.
#include "../launch.cuh"
#include "cuda.h"
#include "problem.h"

namespace kd::softmax {
namespace {

struct Call {
  Plan plan;
  Problem<float> problem;
  int64_t n;
};

// log2(e)/temperature in two pieces: as one number it would cost a probability of e^−80 a relative
// error of 5e-6.
struct Scale {
  float high, low;
  __device__ explicit Scale(float temperature) {
    constexpr float log2_e_low = 1.92596299e-8f;
    high = log2_e<float> / temperature;
    low = (fmaf(-high, temperature, log2_e<float>) + log2_e_low) / temperature;
  }
  __device__ __forceinline__ float exponential(float x) const {
    float product = x * high;
    // −inf − (−inf) and 0·inf say nothing about a product of −inf.
    float rest = x == -infinity<float>() ? 0.f : fmaf(x, high, -product) + x * low;
    float e = exp2_hardware(product);
    return fmaf(e, rest * 0.69314718f, e);
  }
};

struct Maximum {
  float value;
  __device__ void across(int width) { value = lanes_max(value, width); }
};

// Σ e, with the columns at the maximum counted apart: the log-probability of a column near 1 is
// log(1 + the rest).
struct Exponentials {
  double ones, rest;
  __device__ void across(int width) {
    ones = lanes_sum(ones, width);
    rest = lanes_sum(rest, width);
  }
};

struct Statistics {
  float maximum;
  Scale scale;
  Exponentials sums;
  __device__ void across(int width) {
    float own = maximum;
    maximum = lanes_max(maximum, width);
    if (own != maximum) {
      float factor = own == -infinity<float>() ? 0.f : scale.exponential(own - maximum);
      sums = {0, (sums.ones + sums.rest) * factor};
    }
    sums.across(width);
  }
  __device__ static Statistics none() { return {-infinity<float>(), Scale(1), {0, 0}}; }
};

struct Products {
  double g, p;
  __device__ void across(int width) {
    g = lanes_sum(g, width);
    p = lanes_sum(p, width);
  }
  __device__ static Products none() { return {0, 0}; }
};

__device__ float checked(float temperature) {
  return temperature > 0 ? temperature : not_a_number<float>();
}

__global__ void __launch_bounds__(kThreads, 4) softmax_rows(const __grid_constant__ Call call) {
  __shared__ Mailbox mailbox;
  const Problem<float>& p = call.problem;
  const Plan& plan = call.plan;
  Team team(plan, &mailbox, nullptr);
  bool warps = plan.split == Split::warps;
  Memory own{warps ? static_cast<int>(threadIdx.x / 32) * (plan.shared_bytes / kWarps) : 0};
  Area area = own.raw(p.x, plan.tile), kept = own.floats(plan.tile);
  Share share(plan, team, p.x.columns);
  for (share.i = team.first_row; share.i < call.n; share.i += team.stride) {
    float temperature = checked(p.temperature.at(share.i));
    Scale scale(temperature);
    Statistics all{-infinity<float>(), scale, {0, 0}};
    for (int tile = 0; tile < share.tiles(); ++tile) {
      if (tile > 0) team.sync();
      fetch(team, area, share.piece(p.x, tile));
      wait_for_copies();
      team.sync();
      straighten(team, area, share.piece(p.x, tile));
      Maximum here{-infinity<float>()};
      share.for_slots(tile, [&](int slot) {
        float x[kSlot];
        load_slot(area, slot, p.x.dtype, x);
        here.value = fmaxf(here.value, largest(x));
      });
      team.reduce(here);
      float before = all.maximum;
      all.maximum = fmaxf(before, here.value);
      if (before != all.maximum) {
        float factor = before == -infinity<float>() ? 0.f : scale.exponential(before - all.maximum);
        all.sums = {0, (all.sums.ones + all.sums.rest) * factor};
      }
      float anchor = anchored(all.maximum), rest = 0;
      int ones = 0;
      share.for_slots(tile, [&](int slot) {
        float x[kSlot], e[kSlot];
        load_slot(area, slot, p.x.dtype, x);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) e[j] = scale.exponential(x[j] - anchor);
        if (!p.log && plan.keeps) store_floats(kept, slot, e);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          ones += e[j] == 1;
          e[j] = e[j] == 1 ? 0.f : e[j];
        }
        rest += total(e);
      });
      all.sums.ones += ones;
      all.sums.rest += rest;
    }
    team.reduce(all.sums);
    float own_maximum = all.maximum;
    team.exchange(all);
    float anchor = anchored(all.maximum);
    double z = all.sums.ones + all.sums.rest;
    float log_z = log_of_sum((all.sums.ones - 1) + all.sums.rest);
    float factor = static_cast<float>(1 / z), inverse_temperature = 1 / temperature;
    if (plan.keeps && own_maximum != all.maximum) {
      factor *= own_maximum == -infinity<float>() ? 0.f : scale.exponential(own_maximum - anchor);
    }
    for (int tile = 0; tile < share.tiles(); ++tile) {
      if (share.tiles() > 1) {
        team.sync();
        fetch(team, area, share.piece(p.x, tile));
        wait_for_copies();
        team.sync();
        straighten(team, area, share.piece(p.x, tile));
      }
      share.for_slots(tile, [&](int slot) {
        float x[kSlot], out[kSlot];
        if (!p.log && plan.keeps) {
          load_floats(kept, slot, out);
        } else {
          load_slot(area, slot, p.x.dtype, x);
#pragma unroll
          for (int j = 0; j < kSlot; ++j) {
            out[j] = p.log ? (x[j] - anchor) * inverse_temperature - log_z
                           : scale.exponential(x[j] - anchor);
          }
        }
        if (!p.log) {
#pragma unroll
          for (int j = 0; j < kSlot; ++j) out[j] *= factor;
        }
        store_slot(area, slot, p.output.dtype, out);
      });
      team.sync();
      put(team, area, share.piece(p.output, tile));
    }
    team.sync();
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    softmax_backward_rows(const __grid_constant__ Call call) {
  __shared__ Mailbox mailbox;
  const Problem<float>& p = call.problem;
  const Plan& plan = call.plan;
  Team team(plan, &mailbox, nullptr);
  bool warps = plan.split == Split::warps;
  Memory own{warps ? static_cast<int>(threadIdx.x / 32) * (plan.shared_bytes / kWarps) : 0};
  Area upstream = own.raw(p.x, plan.tile), output = own.raw(p.output, plan.tile);
  Share share(plan, team, p.x.columns);
  auto stage = [&](int tile, bool again) {
    if (again && share.tiles() == 1) return;
    team.sync();
    fetch(team, upstream, share.piece(p.x, tile));
    fetch(team, output, share.piece(p.output, tile));
    wait_for_copies();
    team.sync();
    straighten(team, upstream, share.piece(p.x, tile));
    straighten(team, output, share.piece(p.output, tile));
  };
  for (share.i = team.first_row; share.i < call.n; share.i += team.stride) {
    // In double: in the gradient they cancel against single columns wherever a row is nearly
    // one-hot.
    Products sums{0, 0};
    for (int tile = 0; tile < share.tiles(); ++tile) {
      stage(tile, false);
      share.for_slots(tile, [&](int slot) {
        float g[kSlot], y[kSlot];
        load_slot(upstream, slot, p.x.dtype, g);
        load_slot(output, slot, p.output.dtype, y);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          bool inside = slot * kSlot + j < share.columns(tile);
          double weight = p.log ? 1.0 : static_cast<double>(y[j]);
          sums.g += inside ? times(weight, static_cast<double>(g[j])) : 0.0;
          sums.p += inside && !p.log ? weight : 0.0;
        }
      });
    }
    team.reduce(sums);
    team.exchange(sums);
    // The rounded probabilities do not add up to 1.
    float sum = static_cast<float>(p.log ? sums.g : sums.g / sums.p);
    float scale = 1 / p.temperature.at(share.i);
    for (int tile = 0; tile < share.tiles(); ++tile) {
      stage(tile, true);
      share.for_slots(tile, [&](int slot) {
        float g[kSlot], y[kSlot];
        load_slot(upstream, slot, p.x.dtype, g);
        load_slot(output, slot, p.output.dtype, y);
#pragma unroll
        for (int j = 0; j < kSlot; ++j) {
          y[j] = p.log ? (g[j] - exp2_hardware(y[j] * log2_e<float>) * sum) * scale
                       : times(y[j], (g[j] - sum) * scale);
        }
        store_slot(output, slot, p.gradient.dtype, y);
      });
      team.sync();
      put(team, output, share.piece(p.gradient, tile));
    }
    team.sync();
  }
}

CudaStatus run(const char* name, void (*kernel)(Call), const Problem<float>& problem, int64_t n,
               bool backward, CudaStream stream) {
  if (n == 0) return {};
  const Matrix& written = backward ? problem.gradient : problem.output;
  const Matrix& under = backward ? problem.output : problem.x;
  if (written.dtype != under.dtype || written.dtype == Dtype::float64 ||
      problem.x.dtype == Dtype::float64) {
    return failure(cudaErrorInvalidValue, name, "dtypes", "");
  }
  Device device;
  CudaStatus status = current_device(name, &device);
  if (status.code != 0) return status;
  auto raw = [&](int64_t slots) {
    int64_t bytes = area_bytes(static_cast<int>(slots), size_of(problem.x.dtype));
    if (backward) bytes += area_bytes(static_cast<int>(slots), size_of(problem.output.dtype));
    return bytes;
  };
  auto kept = [&](int64_t slots) {
    return raw(slots) + (backward || problem.log ? 0 : 2 * plane_bytes(static_cast<int>(slots)));
  };
  Call call{plan_rows(device, problem.x.columns, Meeting::clusters, false, raw, kept), problem, n};
  return launch_rows(name, kernel, call, n, device, stream);
}

}  // namespace

CudaStatus cuda_forward(const Problem<float>& problem, int64_t n, CudaStream stream) {
  return run(problem.log ? "log_softmax" : "softmax", softmax_rows, problem, n, false, stream);
}

CudaStatus cuda_backward(const Problem<float>& problem, int64_t n, CudaStream stream) {
  return run(problem.log ? "log_softmax_backward" : "softmax_backward", softmax_backward_rows,
             problem, n, true, stream);
}

}  // namespace kd::softmax
