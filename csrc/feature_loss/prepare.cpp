#include "../cpu_level.h"
#include "problem.h"

namespace kd::features {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

const Kernels& kernels() { return KD_AT_CPU_LEVEL(kernels); }

template <class Real>
double divisor_of(const Layer<Real>& layer, Metric metric, Reduction reduction, int64_t positions,
                  int64_t channels) {
  if (reduction == Reduction::sum || reduction == Reduction::none) return 1;
  bool of_samples = metric == Metric::attention && reduction == Reduction::batchmean;
  double divisor = 0;
  if (layer.mask == nullptr) {
    divisor = static_cast<double>(layer.samples) *
              static_cast<double>(of_samples ? positions > 0 : positions);
  } else {
    for (int64_t sample = 0; sample < layer.samples; ++sample) {
      double sum = 0;
      int64_t counted = 0;
      for (int64_t o = 0; o < layer.outer_size(); ++o) {
        const Real* mask = layer.mask + layer.offset(layer.mask_strides, sample, o);
        for (int64_t i = 0; i < layer.inner; ++i) {
          Real weight = mask[i * layer.mask_strides.inner];
          sum += weight;
          counted += weight != 0;
        }
      }
      divisor += of_samples && counted > 0 ? sum / static_cast<double>(counted) : sum;
    }
  }
  bool of_elements =
      reduction == Reduction::mean && metric != Metric::cosine && metric != Metric::attention;
  divisor *= of_elements ? static_cast<double>(channels) : 1;
  return divisor == 0 ? 1 : divisor;
}

template <class Real>
void divide(Layer<Real>& layer, Metric metric, bool normalize, int64_t& pieces) {
  // Elements of a piece: enough that starting one costs little, few enough that what is read more
  // than once stays in the second-level cache. A Gaussian's piece leaves a sum for each channel.
  int64_t elements = metric == Metric::gaussian_nll ? 65536 : 8192;
  int64_t positions = elements / layer.channels / 64 * 64;
  bool along_channels = layer.student.strides.channel == 1;
  int64_t least = along_channels ? elements / layer.channels + 1 : 64;
  positions = positions < least ? least : positions;
  // The sums of normalised vectors are kept for each position.
  int64_t most = normalize || metric == Metric::cosine ? 512 : elements;
  positions = positions > most ? most : positions;
  positions = positions > layer.inner ? layer.inner : positions;
  layer.piece_positions = positions;
  layer.pieces_a_line = positions == 0 ? 0 : (layer.inner + positions - 1) / positions;
  bool whole = metric == Metric::attention;
  int64_t lines = layer.samples * layer.outer_size();
  layer.pieces = whole ? layer.samples : lines * layer.pieces_a_line;
  layer.piece_cost = (whole ? layer.positions() : positions) *
                         (whole ? layer.channels + layer.teacher_channels : layer.channels) +
                     256;
  layer.first_piece = pieces;
  pieces += layer.pieces;
}

template double divisor_of(const Layer<float>&, Metric, Reduction, int64_t, int64_t);
template double divisor_of(const Layer<double>&, Metric, Reduction, int64_t, int64_t);
template void divide(Layer<float>&, Metric, bool, int64_t&);
template void divide(Layer<double>&, Metric, bool, int64_t&);

}  // namespace kd::features
