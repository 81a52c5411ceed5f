// How CUDA threads share rows, for every op: who works on a row together, how a share of a row gets
// into shared memory and a gradient out of it, and sums over it. Includes no torch header.
//
// A *team* works on a row: a warp (short rows), a block, or several blocks, which are a cluster
// where the chip has clusters and blocks of a cooperative launch where it has not. A row is cut
// into slots of eight columns; a thread owns every n-th slot of its block's share, in every sweep.
// Which column belongs to whom, and so the order of every sum, depends on the number of columns,
// the dtypes and the chip, never on where a row lies or what lies beside it.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"
#include "elementary.h"

namespace kd {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSlot = 8;             // columns
constexpr int kStaticShared = 4096;  // bytes, at least, of any kernel here
constexpr int kMaxBlocks = 32;       // a row: a warp combines their results with one lane each

enum class Split { warps, block, cluster, grid };

// How rows are shared out. Depends on columns, dtypes and chip; `teams` on the number of rows too.
struct Plan {
  Split split = Split::block;
  int blocks = 1;      // a row
  int share = 0;       // slots of a row's block (of a row's warp)
  int tile = 0;        // slots that shared memory holds at a time; the share where it is resident
  bool keeps = false;  // room for two floats a column, which save exponentials
  int64_t teams = 0;
  int shared_bytes = 0;
};

// What a block of a cooperative launch has in device memory: a ticket or a counter for each, zeroed
// before the launch, and what it hands to the others.
constexpr int kMaxTeamBlocks = 1024;  // in a launch whose blocks wait for each other
// Bytes; not a multiple of 64, so that eight of them are read without bank conflicts.
constexpr int kMessage = 72;
struct Workspace {
  unsigned ticket;
  unsigned arrived[kMaxTeamBlocks];
  alignas(8) char messages[kMaxTeamBlocks][2][kMessage];
  static constexpr int64_t zeroed = 4 + 4 * kMaxTeamBlocks;
};

// Rows of 16-bit numbers, or of floats in two planes, so that a warp's 16-byte accesses to
// consecutive slots have no bank conflict.
struct Area {
  int data;   // bytes from the beginning of the block's dynamic shared memory
  int plane;  // bytes from the first half of a float slot to the second; 0 for 16-bit
};

__host__ __device__ inline int plane_bytes(int slots) {
  return (slots * 16 + 127) / 128 * 128 + 64;
}
__host__ __device__ inline int area_bytes(int slots, int64_t size) {
  // One chunk more than the slots have: rows that start in the middle of one.
  return size == 4 ? 2 * plane_bytes(slots + 1) : (slots * 16 + 16 + 127) / 128 * 128;
}

#if defined(__CUDACC__)
namespace {

extern __shared__ __align__(16) char shared_memory[];

// ---- numbers ----

__device__ __forceinline__ float half_to_float(unsigned bits) {
  float y;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(bits));
  return y;
}

__device__ __forceinline__ void unpack(uint4 v, Dtype dtype, float (&x)[kSlot]) {
  const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bool brain = dtype == Dtype::bfloat16;
    x[2 * i] = brain ? __uint_as_float(w[i] << 16) : half_to_float(w[i] & 0xffffu);
    x[2 * i + 1] = brain ? __uint_as_float(w[i] & 0xffff0000u) : half_to_float(w[i] >> 16);
  }
}

__device__ __forceinline__ uint4 pack(const float (&x)[kSlot], Dtype dtype) {
  unsigned w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == Dtype::bfloat16) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    }
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ uint4& chunk(const Area& area, int j) {
  int at = area.plane == 0 ? j * 16 : (j & 1) * area.plane + (j >> 1) * 16;
  return *reinterpret_cast<uint4*>(shared_memory + area.data + at);
}

__device__ __forceinline__ void load_floats(const Area& area, int slot, float (&x)[kSlot]) {
  float4 a = *reinterpret_cast<const float4*>(shared_memory + area.data + slot * 16);
  float4 b = *reinterpret_cast<const float4*>(shared_memory + area.data + area.plane + slot * 16);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store_floats(const Area& area, int slot, const float (&x)[kSlot]) {
  *reinterpret_cast<float4*>(shared_memory + area.data + slot * 16) =
      make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(shared_memory + area.data + area.plane + slot * 16) =
      make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void load_slot(const Area& area, int slot, Dtype dtype,
                                          float (&x)[kSlot]) {
  if (dtype == Dtype::float32) {
    load_floats(area, slot, x);
  } else {
    unpack(*reinterpret_cast<const uint4*>(shared_memory + area.data + slot * 16), dtype, x);
  }
}

__device__ __forceinline__ void store_slot(const Area& area, int slot, Dtype dtype,
                                           const float (&x)[kSlot]) {
  if (dtype == Dtype::float32) {
    store_floats(area, slot, x);
  } else {
    *reinterpret_cast<uint4*>(shared_memory + area.data + slot * 16) = pack(x, dtype);
  }
}

__device__ __forceinline__ float load_one(const char* row, Dtype dtype, int64_t column) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(row)[column];
  unsigned bits = reinterpret_cast<const uint16_t*>(row)[column];
  return dtype == Dtype::bfloat16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

// Bytes `shift` to `shift + 15` of two chunks.
__device__ __forceinline__ uint4 straddle(uint4 low, uint4 high, int shift) {
  unsigned bits = (shift & 3) * 8;
  auto join = [&](unsigned a, unsigned b, unsigned c, unsigned d, unsigned e) {
    return make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits),
                      __funnelshift_r(c, d, bits), __funnelshift_r(d, e, bits));
  };
  switch (shift >> 2) {
    case 0:
      return join(low.x, low.y, low.z, low.w, high.x);
    case 1:
      return join(low.y, low.z, low.w, high.x, high.y);
    case 2:
      return join(low.z, low.w, high.x, high.y, high.z);
    default:
      return join(low.w, high.x, high.y, high.z, high.w);
  }
}

__device__ __forceinline__ void copy_async(uint4& shared, const void* global) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <class T>
__device__ __forceinline__ T lanes_sum(T x, int width) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    if (step < width) x += __shfl_xor_sync(0xffffffffu, x, step);
  }
  return x;
}
__device__ __forceinline__ float lanes_max(float x, int width) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    if (step < width) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  return x;
}
__device__ __forceinline__ int lanes_min(int x, int width) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    if (step < width) x = min(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  return x;
}

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

__device__ __forceinline__ float anchored(float maximum) {
  return maximum == -infinity<float>() ? 0.f : maximum;
}

// What e^((… − from)/τ) is to be multiplied by to be relative to another maximum.
__device__ __forceinline__ float rescale(float from, float to, float c) {
  if (from == to) return 1;
  if (from == -infinity<float>()) return 0;
  return exp2_hardware((from - to) * c);
}

// The logarithm of a sum of exponentials relative to their maximum, from that sum less 1: near 1
// its digits are there.
__device__ __forceinline__ float log_of_sum(double less_one) {
  float f = static_cast<float>(less_one);
  return f >= 0 && f < 0.4f ? f * log1p_ratio(f) : log(static_cast<float>(less_one + 1));
}

__device__ __forceinline__ void replace(float (&x)[kSlot], int at, float value) {
  if (static_cast<unsigned>(at) >= kSlot) return;
#pragma unroll
  for (int j = 0; j < kSlot; ++j) x[j] = j == at ? value : x[j];
}

__device__ __forceinline__ float total(const float (&x)[kSlot]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

__device__ __forceinline__ float largest(const float (&x)[kSlot]) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])),
               fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}

// ---- a team ----

// The shared memory of a block that is not for rows.
struct Mailbox {
  alignas(8) char warps[2][kWarps][kMessage];
  alignas(8) char blocks[2][8][kMessage];  // written by the others of a cluster
};

// The threads of a team in one block.
struct Crew {
  Split split;
  int thread, threads;

  __device__ __forceinline__ void sync() const {
    if (split == Split::warps) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

struct Team : Crew {
  int blocks, rank;  // blocks a row, and which of them this is
  int lane;
  int64_t first_row, stride;  // rows first_row, first_row + stride, …
  Mailbox* mailbox;
  Workspace* workspace;
  unsigned reductions = 0, exchanges = 0;

  __device__ Team(const Plan& plan, Mailbox* mailbox, Workspace* workspace)
      : blocks(plan.blocks), mailbox(mailbox), workspace(workspace) {
    split = plan.split;
    lane = threadIdx.x % 32;
    bool warps = split == Split::warps;
    thread = warps ? lane : threadIdx.x;
    threads = warps ? 32 : kThreads;
    rank = warps ? 0 : blockIdx.x % blocks;
    first_row = warps ? int64_t(blockIdx.x) * kWarps + threadIdx.x / 32 : blockIdx.x / blocks;
    stride = plan.teams;
    // Nobody writes into a block that has not started.
    if (split == Split::cluster) cluster_barrier();
  }

  // A P has `across(width)`, which combines those of `width` neighbouring lanes in every lane, bit
  // for bit the same in each, and `none()`. After this every thread of the block has the team's.
  template <class P>
  __device__ __forceinline__ void reduce(P& mine) {
    if (split == Split::warps) return mine.across(32);
    reduce_block(mine);
  }

  // The same over all threads of the block, whatever the team is.
  template <class P>
  __device__ __forceinline__ void reduce_block(P& mine) {
    static_assert(sizeof(P) <= kMessage, "a message");
    mine.across(32);
    // Two sets in turn: between two uses of one, everyone passes the barrier of the other.
    auto slots = mailbox->warps[reductions++ % 2];
    if (lane == 0) *reinterpret_cast<P*>(slots[threadIdx.x / 32]) = mine;
    __syncthreads();
    mine = *reinterpret_cast<const P*>(slots[lane % kWarps]);
    mine.across(kWarps);
  }

  // The same over the blocks of a row, from what `reduce` gave each; in the order of their ranks.
  template <class P>
  __device__ __forceinline__ void exchange(P& mine) {
    if (blocks == 1) return;
    unsigned set = exchanges++ % 2;
    if (split == Split::cluster) {
#if __CUDA_ARCH__ >= 900
      if (threadIdx.x < blocks) {
        uint64_t here = reinterpret_cast<uint64_t>(mailbox->blocks[set][rank]), there;
        asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(threadIdx.x));
        *reinterpret_cast<P*>(there) = mine;
      }
      cluster_barrier();
      mine = lane < blocks ? *reinterpret_cast<const P*>(mailbox->blocks[set][lane]) : P::none();
#else
      __trap();  // PTX of an older architecture, on a chip for which the host planned clusters
#endif
    } else if (split == Split::grid) {
      int first = blockIdx.x - rank;
      if (threadIdx.x == 0) {
        send(mine, workspace->messages[blockIdx.x][set]);
        __threadfence();
        unsigned* arrived = workspace->arrived + first;
        atomicAdd(arrived, 1);
        while (*static_cast<volatile unsigned*>(arrived) < exchanges * blocks) {
        }
        __threadfence();
      }
      __syncthreads();
      mine = P::none();
      if (lane < blocks) receive(mine, workspace->messages[first + lane][set]);
    }
    mine.across(32);
  }

 private:
  // Past the first-level cache, which another multiprocessor's writes do not reach.
  template <class P>
  __device__ __forceinline__ static void send(const P& p, char* to) {
#pragma unroll
    for (int i = 0; i < sizeof(P) / 4; ++i) {
      __stcg(reinterpret_cast<unsigned*>(to) + i, reinterpret_cast<const unsigned*>(&p)[i]);
    }
  }
  template <class P>
  __device__ __forceinline__ static void receive(P& p, const char* from) {
#pragma unroll
    for (int i = 0; i < sizeof(P) / 4; ++i) {
      reinterpret_cast<unsigned*>(&p)[i] = __ldcg(reinterpret_cast<const unsigned*>(from) + i);
    }
  }
};

// ---- a share of a row in shared memory ----

// Part of a row: n columns that start at `data`, which is aligned to its elements only.
struct Piece {
  char* data;
  Dtype dtype;
  int n;
  __device__ __forceinline__ int size() const { return dtype == Dtype::float32 ? 4 : 2; }
  // Bytes from the last 16-byte boundary to the first column.
  __device__ __forceinline__ int shift() const {
    return static_cast<int>(reinterpret_cast<uint64_t>(data) & 15);
  }
  __device__ __forceinline__ int chunks() const { return (shift() + n * size() + 15) >> 4; }
  __device__ __forceinline__ bool whole(int j) const {
    return j * 16 >= shift() && j * 16 + 16 - shift() <= n * size();
  }
  __device__ __forceinline__ char* at(int j) const { return data - shift() + j * 16; }
};

// Calls, not inlined: they happen once a tile, and their addresses would be held in registers
// through every sweep.

// Copies a piece as it lies, chunk by aligned chunk; columns of its last slots behind its end are
// −inf. To be followed by wait_for_copies, a sync and `straighten`.
__device__ __noinline__ void fetch(Crew team, Area area, Piece piece) {
  int slots = (piece.n + kSlot - 1) / kSlot;
  int chunks = slots * (piece.size() / 2) + (piece.shift() != 0);
#pragma unroll 1
  for (int j = team.thread; j < chunks; j += team.threads) {
    if (piece.whole(j)) {
      copy_async(chunk(area, j), piece.at(j));
      continue;
    }
    unsigned w[4];
    if (piece.dtype == Dtype::float32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int column = (j * 16 - piece.shift()) / 4 + i;
        bool inside = column >= 0 && column < piece.n;
        w[i] = inside ? reinterpret_cast<const unsigned*>(piece.data)[column] : 0xff800000u;
      }
    } else {
      unsigned nothing = piece.dtype == Dtype::bfloat16 ? 0xff80u : 0xfc00u;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int column = (j * 16 - piece.shift()) / 2 + i;
        bool inside = column >= 0 && column < piece.n;
        unsigned x = inside ? reinterpret_cast<const uint16_t*>(piece.data)[column] : nothing;
        w[i / 2] = i % 2 ? w[i / 2] | x << 16 : x;
      }
    }
    chunk(area, j) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// Moves a fetched piece that starts in the middle of a chunk to where its slots belong.
__device__ __noinline__ void straighten(Crew team, Area area, Piece piece) {
  int shift = piece.shift();
  if (shift == 0) return;
  int slots = (piece.n + kSlot - 1) / kSlot;
  for (int round = 0; round < slots; round += team.threads) {
    int slot = round + team.thread;
    bool mine = slot < slots;
    uint4 a, b, c;
    if (piece.dtype == Dtype::float32) {
      if (mine) a = chunk(area, 2 * slot), b = chunk(area, 2 * slot + 1);
      if (mine) c = chunk(area, 2 * slot + 2);
      team.sync();
      if (mine) chunk(area, 2 * slot) = straddle(a, b, shift);
      if (mine) chunk(area, 2 * slot + 1) = straddle(b, c, shift);
    } else {
      if (mine) a = chunk(area, slot), b = chunk(area, slot + 1);
      team.sync();
      if (mine) chunk(area, slot) = straddle(a, b, shift);
    }
  }
}

__device__ __forceinline__ void store_part(const Piece& to, int j, uint4 v) {
  const unsigned w[4] = {v.x, v.y, v.z, v.w};
  if (to.dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int column = (j * 16 - to.shift()) / 4 + i;
      if (column >= 0 && column < to.n) reinterpret_cast<unsigned*>(to.data)[column] = w[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int column = (j * 16 - to.shift()) / 2 + i;
      if (column >= 0 && column < to.n) {
        reinterpret_cast<uint16_t*>(to.data)[column] =
            static_cast<uint16_t>(w[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

// Writes the slots of an area to a piece: 16 bytes wide but for its ends. Everyone must have stored
// his slots (a sync before).
__device__ __noinline__ void put(Crew team, Area area, Piece to) {
  int shift = to.shift(), chunks = to.chunks();
  int filled = (to.n + kSlot - 1) / kSlot * (to.size() / 2);
#pragma unroll 1
  for (int j = team.thread; j < chunks; j += team.threads) {
    uint4 v = j < filled ? chunk(area, j) : make_uint4(0, 0, 0, 0);
    if (shift != 0) {
      uint4 before = j > 0 ? chunk(area, j - 1) : make_uint4(0, 0, 0, 0);
      v = straddle(before, v, 16 - shift);
    }
    if (to.whole(j)) {
      *reinterpret_cast<uint4*>(to.at(j)) = v;
    } else {
      store_part(to, j, v);
    }
  }
}

// Columns [from, columns) of a row, every `blocks`-th part of them.
__device__ __noinline__ void put_zeros(Crew team, int rank, int blocks, Matrix matrix, int64_t row,
                                       int64_t from) {
  constexpr int64_t most = 1 << 28;  // a piece's own arithmetic is in 32 bits
  for (int64_t start = from; start < matrix.columns; start += most) {
    int n = static_cast<int>(min(most, matrix.columns - start));
    Piece to{matrix.row(row) + start * size_of(matrix.dtype), matrix.dtype, n};
    int step = team.threads * blocks, chunks = to.chunks();
#pragma unroll 1
    for (int j = rank * team.threads + team.thread; j < chunks; j += step) {
      if (to.whole(j)) {
        *reinterpret_cast<uint4*>(to.at(j)) = make_uint4(0, 0, 0, 0);
      } else {
        store_part(to, j, make_uint4(0, 0, 0, 0));
      }
    }
  }
}

// A block's (or warp's) share of the rows, tile by tile.
struct Share {
  const Plan& plan;
  Team& team;
  int64_t vocab;  // columns of a row
  int64_t i = 0;  // the row at hand

  __device__ Share(const Plan& plan, Team& team, int64_t vocab)
      : plan(plan), team(team), vocab(vocab) {}

  __device__ int tiles() const { return (plan.share + plan.tile - 1) / plan.tile; }
  __device__ int64_t first_column(int tile) const {
    return (int64_t(team.rank) * plan.share + int64_t(tile) * plan.tile) * kSlot;
  }
  __device__ int columns(int tile) const {
    int64_t slots = min(plan.tile, plan.share - tile * plan.tile);
    return static_cast<int>(max(int64_t(0), min(slots * kSlot, vocab - first_column(tile))));
  }
  __device__ Piece piece(const Matrix& m, int tile) const {
    return {m.row(i) + first_column(tile) * size_of(m.dtype), m.dtype, columns(tile)};
  }

  template <class F>
  __device__ __forceinline__ void for_slots(int tile, F each) const {
    int n = columns(tile);
#pragma unroll 1
    for (int slot = team.thread; slot * kSlot < n; slot += team.threads) each(slot);
  }
};

// Shared memory handed out from its beginning.
struct Memory {
  int next;
  __device__ Area raw(const Matrix& m, int slots) {
    int size = static_cast<int>(size_of(m.dtype));
    Area area{next, size == 4 ? plane_bytes(slots + 1) : 0};
    next += area_bytes(slots, size);
    return area;
  }
  __device__ Area floats(int slots) {
    Area area{next, plane_bytes(slots)};
    next += 2 * area.plane;
    return area;
  }
};

}  // namespace
#endif

}  // namespace kd
