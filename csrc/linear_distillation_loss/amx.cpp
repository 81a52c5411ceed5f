#include "amx.h"

#include "../cpu_level.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
// g++ 12 takes the undefined registers of its own header for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "../scratch.h"

#define KD_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))

namespace kd {
namespace {

constexpr int64_t kTile = 16;          // rows of a tile, and 32-bit columns
constexpr int64_t kDepth = 2 * kTile;  // bfloat16 columns of a tile

bool detect() {
  if (cpu_level() != avx512) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!(d & kBfloat16) || !(d & kTiles)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};  // bytes
  uint8_t rows[16] = {};
};

// Eight whole tiles while it lives. What was configured before comes back: oneDNN keeps its tiles
// configured between calls on a thread and remembers that.
class Tiles {
 public:
  KD_AMX Tiles() {
    _tile_storeconfig(&before_);
    TileConfig whole;
    for (int i = 0; i < 8; ++i) {
      whole.columns[i] = 64;
      whole.rows[i] = kTile;
    }
    _tile_loadconfig(&whole);
  }
  KD_AMX ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// 16 rows of 16 32-bit columns, transposed.
KD_AMX inline void transpose(const __m512i in[16], __m512i out[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    out[i + 4] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
}

// n ≤ 16 rows of the weight as right-hand tiles, one for each 32 of the k columns: pairs of columns
// by rows. Zeros where there are no more rows or columns.
KD_AMX void pack(const uint16_t* weight, int64_t stride, int64_t n, int64_t k, uint16_t* out) {
  for (int64_t p = 0; p < k; p += kDepth, out += kTile * kDepth) {
    int64_t width = k - p < kDepth ? k - p : kDepth;
    __mmask32 columns = static_cast<__mmask32>((uint64_t{1} << width) - 1);
    __m512i in[16], by_columns[16];
    for (int i = 0; i < 16; ++i) {
      in[i] = i < n ? _mm512_maskz_loadu_epi16(columns, weight + i * stride + p)
                    : _mm512_setzero_si512();
    }
    transpose(in, by_columns);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * kDepth, by_columns[i]);
  }
}

}  // namespace

bool has_amx() {
  static const bool has = detect();
  return has;
}

AmxHidden::AmxHidden(const uint16_t* hidden, int64_t stride, int64_t m, int64_t k)
    : m_(m),
      k_(k),
      rows_((m + 2 * kTile - 1) / (2 * kTile) * (2 * kTile)),
      steps_((k + kDepth - 1) / kDepth),
      hidden_(rows_ * steps_ * kDepth) {
  // Tile after tile: 16 rows of 64 bytes.
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t step = 0; step < steps_; ++step) {
      int64_t p = step * kDepth, width = k - p < kDepth ? k - p : kDepth;
      uint16_t* tile = hidden_.data() + ((i / kTile) * steps_ + step) * kTile * kDepth;
      memcpy(tile + i % kTile * kDepth, hidden + i * stride + p, width * sizeof(uint16_t));
    }
  }
}

KD_AMX void AmxHidden::logits(const uint16_t* weight, int64_t weight_stride, float* out,
                              int64_t out_stride, int64_t begin, int64_t end) const {
  thread_local Scratch<uint16_t> scratch;
  int64_t strip = steps_ * kTile * kDepth;  // of 16 rows, in tiles
  uint16_t* packed = scratch.get(kPanel / kTile * strip);
  alignas(64) float edge[kTile * kTile];
  Tiles tiles;
  for (int64_t start = begin; start < end; start += kPanel) {
    int64_t columns = end - start < kPanel ? end - start : kPanel;
    int64_t strips = (columns + 2 * kTile - 1) / (2 * kTile) * 2;
    for (int64_t j = 0; j < strips; ++j) {
      pack(weight + (start + j * kTile) * weight_stride, weight_stride, columns - j * kTile, k_,
           packed + j * strip);
    }
    // The next panel is asked for while this one is multiplied, a few lines a step: 192 rows of
    // 49152 logits, H = 576, take 15 ms instead of 24.
    const char* next = reinterpret_cast<const char*>(weight + (start + kPanel) * weight_stride);
    int64_t row_lines = (2 * k_ + 63) / 64, row = 0, line = 0;
    int64_t next_rows = end - start - kPanel < kPanel ? end - start - kPanel : kPanel;
    int64_t blocks = rows_ / (2 * kTile) * ((columns + 2 * kTile - 1) / (2 * kTile));
    int64_t lines = (next_rows * row_lines + blocks * steps_ - 1) / (blocks * steps_);
    for (int64_t i = 0; i < rows_; i += 2 * kTile) {
      for (int64_t j = 0; j < columns; j += 2 * kTile) {
        const uint16_t *a = hidden_.data() + i / kTile * strip, *b = packed + j / kTile * strip;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps_; ++step, a += kTile * kDepth, b += kTile * kDepth) {
          for (int64_t some = 0; some < lines && row < next_rows; ++some) {
            __builtin_prefetch(next + row * 2 * weight_stride + line * 64, 0, 2);
            if (++line == row_lines) line = 0, ++row;
          }
          _tile_loadd(4, a, 64);
          _tile_loadd(6, b, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + strip, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a + strip, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        float* to = out + i * out_stride + start + j;
        int64_t bytes = out_stride * static_cast<int64_t>(sizeof(float));
        if (i + 2 * kTile <= m_ && j + 2 * kTile <= columns) {
          _tile_stored(0, to, bytes);
          _tile_stored(1, to + kTile, bytes);
          _tile_stored(2, to + kTile * out_stride, bytes);
          _tile_stored(3, to + kTile * out_stride + kTile, bytes);
          continue;
        }
        auto store_part = [&](int64_t down, int64_t right) {
          int64_t rows = m_ - i - down, width = columns - j - right;
          rows = rows < kTile ? rows : kTile;
          width = width < kTile ? width : kTile;
          for (int64_t row = 0; row < rows && width > 0; ++row) {
            memcpy(to + (down + row) * out_stride + right, edge + row * kTile,
                   width * sizeof(float));
          }
        };
        _tile_stored(0, edge, 64);
        store_part(0, 0);
        _tile_stored(1, edge, 64);
        store_part(0, kTile);
        _tile_stored(2, edge, 64);
        store_part(kTile, 0);
        _tile_stored(3, edge, 64);
        store_part(kTile, kTile);
      }
    }
  }
}

}  // namespace kd

#else

namespace kd {

bool has_amx() { return false; }
AmxHidden::AmxHidden(const uint16_t*, int64_t, int64_t, int64_t) {}
void AmxHidden::logits(const uint16_t*, int64_t, float*, int64_t, int64_t, int64_t) const {}

}  // namespace kd
#endif
