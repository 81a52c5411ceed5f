// A head's logits on CPUs with AMX: bfloat16 hidden states and weight, float32 logits.
#pragma once

#include <cstdint>
#include <vector>

namespace kd {

// Whether the CPU has AMX for bfloat16 and the kernel lets this process use it.
bool has_amx();

// Hidden states (m, k) in whole tiles, zeros behind the last row and column: what every panel of
// the weight meets.
class AmxHidden {
 public:
  AmxHidden(const uint16_t* hidden, int64_t stride, int64_t m, int64_t k);

  // Columns of the weight's rows taken together; a panel of them stays in the second-level cache.
  static constexpr int64_t kPanel = 64;

  // out[:, begin : end] = hidden · weight[begin : end]ᵀ, for begin a multiple of kPanel.
  void logits(const uint16_t* weight, int64_t weight_stride, float* out, int64_t out_stride,
              int64_t begin, int64_t end) const;

 private:
  int64_t m_, k_, rows_, steps_;  // rows_: m in whole pairs of tiles; steps_: k in whole tiles
  std::vector<uint16_t> hidden_;
};

}  // namespace kd
