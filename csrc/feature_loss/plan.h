// How feature_loss's layers are divided among CUDA blocks, and a launch's arguments. Host code, for
// its own launcher and joint_distillation_loss's.
#pragma once

#include "../launch.cuh"
#include "pieces.cuh"

namespace kd::features {

constexpr const char* kName = "feature_loss";

inline Family family_of(const DeviceProblem& p) {
  if (p.metric == Metric::attention) return Family::maps;
  if (p.metric == Metric::gaussian_nll) return Family::gaussian;
  return p.normalize || p.metric == Metric::cosine ? Family::vectors : Family::elements;
}

// Whether there are nothing but full slots of eight columns, all at multiples of 16 bytes.
inline bool is_wide(const Feature& f, int64_t channels, const DeviceLayer& l) {
  int64_t size = size_of(f.dtype);
  auto multiple = [&](int64_t stride, int64_t n) { return n == 1 || stride * size % 16 == 0; };
  const Strides& s = f.strides;
  bool wide = (l.along ? s.channel : s.inner) == 1 && (l.along ? channels : l.inner) % kSlot == 0 &&
              reinterpret_cast<uint64_t>(f.data) % 16 == 0;
  wide = wide && multiple(s.sample, l.samples);
  wide = wide && (l.along ? multiple(s.inner, l.inner) : multiple(s.channel, channels));
  for (int k = 0; k < kOuter; ++k) wide = wide && multiple(s.outer[k], l.outer[k]);
  return wide;
}

inline int power_of_two(int64_t at_least, int most) {
  int result = 1;
  while (result < at_least && result < most) result *= 2;
  return result;
}

// How threads and pieces cover a layer; depends on its shape, strides and the chip.
inline void divide(DeviceLayer& l, Family family, const Device& device, int* shared) {
  auto up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const Strides& s = l.student.strides;
  l.along = l.channels > 1 && (l.inner == 1 || s.channel < s.inner);
  l.wide = is_wide(l.student, l.channels, l) && is_wide(l.teacher, l.teacher_channels, l) &&
           (!l.gradient.data || is_wide(l.gradient, l.channels, l));
  // A Gaussian's piece leaves a sum for each channel.
  int64_t elements = family == Family::gaussian ? 65536 : 8192;
  bool streams = family == Family::elements || family == Family::gaussian;
  int64_t most = device.shared_per_block - kStaticShared - kExchange;
  auto bytes_of = [](int64_t slots) { return slots * 2 * kSlot * 4 * kThreads; };
  int64_t positions = up(elements, l.channels);
  if (l.along) {
    int64_t slots = up(l.channels, kSlot);
    l.lanes = streams || slots > 256 ? power_of_two(slots, 128) : power_of_two(slots, 32);
    int64_t rows = kThreads / l.lanes;
    positions = up(positions, rows) * rows;
    l.keeps = bytes_of(up(slots, l.lanes)) <= most;
    if (family == Family::vectors && l.keeps) {
      *shared = std::max(*shared, static_cast<int>(bytes_of(up(slots, l.lanes))));
    }
  } else if (streams) {
    positions = std::max<int64_t>(up(positions, kSlot) * kSlot, l.channels == 1 ? 0 : 64);
    l.lanes =
        power_of_two(up(std::min(positions, l.inner), kSlot), l.channels == 1 ? kThreads : 32);
  } else {
    // Neighbouring positions of all channels: as many as let three blocks rest on a
    // multiprocessor.
    l.lanes = power_of_two(up(l.inner, kSlot), 8);
    auto bytes = [&] { return bytes_of(up(l.channels, kThreads / l.lanes)); };
    while (family == Family::vectors && l.lanes > 1 && bytes() > 65536) l.lanes /= 2;
    l.keeps = bytes() <= most;
    if (!l.keeps) l.lanes = power_of_two(up(l.inner, kSlot), 4);
    if (family == Family::vectors && l.keeps) {
      *shared = std::max(*shared, static_cast<int>(bytes()));
    }
    positions = l.lanes * kSlot;
  }
  l.piece_positions = std::min(positions, l.inner);
  l.pieces_a_line = l.piece_positions == 0 ? 0 : up(l.inner, l.piece_positions);
  l.pieces_a_sample = l.pieces_a_line * l.outer_size();
  l.pieces = l.pieces_a_sample * l.samples;
}

inline CudaStatus divide(DeviceProblem& problem, const Device& device, int64_t* bytes) {
  Family family = family_of(problem);
  int64_t pieces = 0, floats = 0;
  problem.shared_bytes = kExchange;
  int shared = 0;
  for (DeviceLayer& l : problem.layers) {
    bool wide = l.student.dtype == Dtype::float64 || l.teacher.dtype == Dtype::float64;
    if (wide) return failure(cudaErrorInvalidValue, kName, "float64 features", "");
    divide(l, family, device, &shared);
    l.first_piece = pieces;
    pieces += l.pieces;
    if (l.variance_gradient.data) floats += l.pieces * l.channels;
    if (family == Family::maps) floats += l.samples * (2 * l.positions() + kStats);
  }
  problem.shared_bytes += shared;
  *bytes = 16 + 8 * (int64_t(kLayersALaunch) * kMaxTeamBlocks + pieces) + 4 * floats;
  return {};
}

// The launch of layers `first` to first + kLayersALaunch.
inline void fill(Call& call, const DeviceProblem& problem, int first, const float* base,
                 void* workspace) {
  char* at = static_cast<char*>(workspace);
  call.counters = reinterpret_cast<Counters*>(at);
  call.divisors = reinterpret_cast<double*>(at + 16);
  double* values = call.divisors + int64_t(kLayersALaunch) * kMaxTeamBlocks;
  const DeviceLayer& last_layer = problem.layers.back();
  int64_t all_pieces = last_layer.first_piece + last_layer.pieces;
  float* floats = reinterpret_cast<float*>(values + all_pieces);
  call.family = family_of(problem);
  call.metric = problem.metric;
  call.beta = problem.beta;
  call.inverse_beta = problem.beta == 0 ? 0 : 1 / problem.beta;
  call.none = problem.reduction == Reduction::none;
  call.base = base;
  call.weights = problem.weights ? problem.weights + first : nullptr;
  call.upstream = problem.upstream;
  call.upstream_stride = problem.upstream_stride;
  call.loss = problem.loss;
  call.parts = problem.parts + first;
  int64_t first_piece = problem.layers[first].first_piece;
  call.values = values + first_piece;
  call.pieces = 0;
  call.waits = call.family == Family::maps;
  call.count = 0;
  for (int i = 0; i < static_cast<int>(problem.layers.size()); ++i) {
    DeviceLayer l = problem.layers[i];
    if (l.variance_gradient.data) {
      l.variance_sums = floats;
      floats += l.pieces * l.channels;
    }
    if (call.family == Family::maps) {
      l.maps = floats;
      l.stats = floats + l.samples * 2 * l.positions();
      floats = l.stats + l.samples * kStats;
    }
    if (i < first || i >= first + kLayersALaunch) continue;
    l.first_piece -= first_piece;
    call.pieces += l.pieces;
    call.waits |= l.divides || l.variance_gradient.data != nullptr;
    call.layers[call.count++] = l;
  }
  call.plan.split = call.waits ? Split::grid : Split::block;
  call.plan.blocks = 1;
  call.plan.shared_bytes = problem.shared_bytes;
}

}  // namespace kd::features
