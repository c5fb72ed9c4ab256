// Batch norm over feature-major activations, where a channel's elements are contiguous; forward.
//
// A channel is cut into parts and those into chunks, by its length alone, so that the result does
// not depend on the threads. A chunk is read once: sum and sum of squares about a shift, which is
// the mean of what came before; chunks are merged in double (Chan, Golub, LeVeque 1979). A sum of
// squares about zero would lose all its digits where the mean is large against the deviation.
#include "batch_norm.h"

#include <cstdint>

#include "kernels_dense.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kSums = 4;          // accumulators per sum: hide the latency of the additions
constexpr int64_t kSample = 256;  // elements that give the first chunk of a part its shift

Moments Merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  const double share = b.count / count;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

Moments ChunkMoments(const float* x, int64_t n, float shift) {
  const Vec middle = vset1(&shift);
  Vec first[kSums], second[kSums];
  for (int k = 0; k < kSums; ++k) first[k] = second[k] = vzero();
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const Vec deviation = vsub(vload(x + i + k * kLanes), middle);
      first[k] = vadd(first[k], deviation);
      second[k] = vfma(deviation, deviation, second[k]);
    }
  }
  for (; i < n; i += kLanes) {
    const Vec value = i + kLanes <= n ? vload(x + i) : LoadTail(x + i, n - i, shift);
    const Vec deviation = vsub(value, middle);
    first[0] = vadd(first[0], deviation);
    second[0] = vfma(deviation, deviation, second[0]);
  }
  const double count = static_cast<double>(n), sum = SumLanes(first);
  return {count, shift + sum / count, SumLanes(second) - sum * sum / count};
}

Moments PartMoments(const float* x, int64_t n) {
  Moments total = {0, 0, 0};
  if (n == 0) return total;
  const Moments sample = ChunkMoments(x, imin(kSample, n), x[0]);
  float shift = static_cast<float>(sample.mean);
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    total = Merged(total, ChunkMoments(x + begin, imin(kChunk, n - begin), shift));
    shift = static_cast<float>(total.mean);
  }
  return total;
}

}  // namespace

Moments ChannelMoments(const float* x, int64_t count) {
  const Parts parts = PartsOf(count);
  Moments total = {0, 0, 0};
  for (int64_t part = 0; part < parts.number; ++part) {
    const int64_t begin = part * parts.length;
    total = Merged(total, PartMoments(x + begin, imin(parts.length, count - begin)));
  }
  return total;
}

namespace {

template <bool kResidual, bool kRelu>
SK_INLINE Vec Output(const Affine& affine, Vec x, Vec residual) {
  Vec value = Apply(affine, x);
  if (kResidual) value = vadd(value, residual);
  return kRelu ? vrelu(value) : value;
}

// y = (x - center) * scale + offset [+ residual], then ReLU. NaN passes through the ReLU.
template <bool kResidual, bool kRelu, bool kStream>
void NormalizeAs(float* y, const float* x, const float* residual, int64_t n,
                 const Affine& constants) {
  const Affine affine = constants;  // in registers: y may alias nothing that the loop can see
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec left = kResidual ? vload(residual + i) : vzero();
    Put<kStream>(y + i, Output<kResidual, kRelu>(affine, vload(x + i), left));
  }
  if (i < n) {
    const Vec left = kResidual ? LoadTail(residual + i, n - i, 0) : vzero();
    StoreTail(y + i, Output<kResidual, kRelu>(affine, LoadTail(x + i, n - i, 0), left), n - i);
  }
}

using Normalizer = void (*)(float*, const float*, const float*, int64_t, const Affine&);

Normalizer ChooseNormalizer(bool residual, bool relu, bool stream) {
  static const Normalizer table[2][2][2] = {
      {{NormalizeAs<false, false, false>, NormalizeAs<false, false, true>},
       {NormalizeAs<false, true, false>, NormalizeAs<false, true, true>}},
      {{NormalizeAs<true, false, false>, NormalizeAs<true, false, true>},
       {NormalizeAs<true, true, false>, NormalizeAs<true, true, true>}}};
  return table[residual][relu][stream];
}

// The constants of a channel, after writing its statistics where they are the batch's own.
Affine Settle(const BatchNormForwardArgs& args, int64_t channel, const Moments& moments) {
  double rounding = 0;
  if (args.training) {
    args.mean[channel] = static_cast<float>(moments.mean);
    const double var = args.count > 0 ? moments.squares / static_cast<double>(args.count) : 0.0;
    args.var[channel] = static_cast<float>(var);
    rounding = moments.mean - static_cast<double>(args.mean[channel]);
  }
  const double scale = ScaleOf(args.weight, args.var[channel], args.eps, channel);
  const double bias = args.bias != nullptr ? args.bias[channel] : 0.0;
  const float offset = static_cast<float>(bias - rounding * scale);
  if (args.offset != nullptr) args.offset[channel] = offset;
  return MakeAffine(args.mean[channel], static_cast<float>(scale), offset);
}

void Normalize(const BatchNormForwardArgs& args, int64_t at, int64_t n, const Affine& affine,
               bool stream) {
  const float* residual = args.residual != nullptr ? args.residual + at : nullptr;
  ChooseNormalizer(residual != nullptr, args.relu, stream)(args.y + at, args.x + at, residual, n,
                                                           affine);
}

void ForwardChannel(const BatchNormForwardArgs& args, int64_t channel, bool stream) {
  const int64_t base = channel * args.count;
  const Moments moments =
      args.training ? ChannelMoments(args.x + base, args.count) : Moments{0, 0, 0};
  Normalize(args, base, args.count, Settle(args, channel, moments), stream);
}

// The same with all threads on one channel.
void ForwardSplit(const BatchNormForwardArgs& args, int64_t channel, bool stream) {
  const int64_t base = channel * args.count;
  const Parts parts = PartsOf(args.count);
  Moments total = {0, 0, 0};
  if (args.training) {
    Moments of_part[kMaxParts];
#pragma omp parallel for schedule(static) num_threads(args.threads)
    for (int64_t part = 0; part < parts.number; ++part) {
      const int64_t begin = part * parts.length;
      of_part[part] = PartMoments(args.x + base + begin, imin(parts.length, args.count - begin));
    }
    for (int64_t part = 0; part < parts.number; ++part) total = Merged(total, of_part[part]);
  }
  const Affine affine = Settle(args, channel, total);
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t part = 0; part < parts.number; ++part) {
    const int64_t begin = part * parts.length;
    Normalize(args, base + begin, imin(parts.length, args.count - begin), affine, stream);
    if (stream) vfence();
  }
}

}  // namespace

void batch_norm_forward(const BatchNormForwardArgs& args) {
  const bool stream = args.y != args.x && Streams(args.y, args.channels, args.count);
  if (SplitsChannels(args.channels, args.count, args.threads)) {
    for (int64_t channel = 0; channel < args.channels; ++channel)
      ForwardSplit(args, channel, stream);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) {
    ForwardChannel(args, channel, stream);
    if (stream) vfence();
  }
}

}  // namespace SK_ISA
}  // namespace sk
