// What the sources of batch norm share: partial vectors, the one expression of the output, how a
// channel is cut into parts.
#pragma once

#include <cstring>

#include "stream.h"

namespace sk {
namespace SK_ISA {

// A chunk stays in L1 and is summed in float; chunks are merged in double.
constexpr int64_t kChunk = 2048;

// The first n < kLanes elements at p, the other lanes `fill`.
SK_INLINE Vec LoadTail(const float* p, int64_t n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
  std::memcpy(lanes, p, n * sizeof(float));
  return vload(lanes);
}

SK_INLINE void StoreTail(float* p, Vec a, int64_t n) {
  float lanes[kLanes];
  vstore(lanes, a);
  std::memcpy(p, lanes, n * sizeof(float));
}

// Sum of all lanes of `acc`, in double, always in the same order.
template <int kCount>
SK_INLINE double SumLanes(const Vec (&acc)[kCount]) {
  double sum = 0;
  for (int k = 0; k < kCount; ++k) {
    float lanes[kLanes];
    vstore(lanes, acc[k]);
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  }
  return sum;
}

// y = (x - center) * scale + offset. Forward and backward both come here: the backward pass takes
// the ReLU's mask from the very value that the forward pass clipped.
struct Affine {
  Vec center, scale, offset;
};

SK_INLINE Affine MakeAffine(float center, float scale, float offset) {
  return {vset1(&center), vset1(&scale), vset1(&offset)};
}

SK_INLINE Vec Apply(const Affine& affine, Vec x) {
  return vfma(vsub(x, affine.center), affine.scale, affine.offset);
}

// weight / sqrt(var + eps), from what the forward pass leaves behind and nothing more precise: the
// backward pass must find the same number.
SK_INLINE double ScaleOf(const float* weight, float var, double eps, int64_t channel) {
  const double w = weight != nullptr ? weight[channel] : 1.0;
  return w / __builtin_sqrt(static_cast<double>(var) + eps);
}

struct Moments {
  double count;
  double mean;
  double squares;  // sum of squared deviations from the mean
};

// Moments of a whole channel of `count` elements (of none: zeros).
Moments ChannelMoments(const float* x, int64_t count);

struct GradientSums {
  double grad;           // sum of g, the gradient behind the ReLU
  double grad_centered;  // sum of g * (x - mean)
  double centered;       // sum of x - mean: not 0, since mean was rounded to float
};

// dx = g * scale + ((x - mean) * slope + offset).
struct Slope {
  float scale, slope, offset;
};

// What dx of a channel is made of; writes its dweight and dbias where those are not null.
struct GradientTarget {
  float* dweight;
  float* dbias;
  const float* weight;  // or null (one)
  float var;
  double eps;
  int64_t count;
  bool training;
};
Slope SettleGradient(const GradientTarget& target, const GradientSums& sums);

// Parts of a channel: what one thread sums or writes. A function of the channel's length alone.
constexpr int64_t kMaxParts = 64;
constexpr int64_t kMinPart = 32768;

struct Parts {
  int64_t length;  // of every part but the last, a multiple of kChunk
  int64_t number;  // at least 1
};

SK_INLINE Parts PartsOf(int64_t count) {
  const int64_t length = round_up(imax(ceil_div(count, kMaxParts), kMinPart), kChunk);
  return {length, imax<int64_t>(ceil_div(count, length), 1)};
}

// Whether the threads share each channel instead of taking whole ones, which finds a channel in the
// cache on its second pass but leaves threads idle where there are few channels.
SK_INLINE bool SplitsChannels(int64_t channels, int64_t count, int threads) {
  return threads > 1 && channels < 4 * threads && channels % threads != 0 &&
         PartsOf(count).number > 1;
}

}  // namespace SK_ISA
}  // namespace sk
