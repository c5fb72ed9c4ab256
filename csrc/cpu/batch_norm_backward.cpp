// Batch norm over feature-major activations, backward: one pass for the sums, one that writes.
//
// The mask of a fused ReLU is recomputed from x by the forward pass's own expression, to the last
// bit, so that its output need not be kept; with a residual it is read from the output.
#include <cstdint>

#include "batch_norm.h"
#include "kernels_dense.h"

namespace sk {
namespace SK_ISA {
Slope SettleGradient(const GradientTarget& t, const GradientSums& sums) {
  const double inverse = 1.0 / __builtin_sqrt(static_cast<double>(t.var) + t.eps);
  const double count = static_cast<double>(t.count);
  // Eval uses the given mean as a constant; in training the exact mean is mean + rounding.
  const bool moves = t.training && t.count > 0;
  const double rounding = moves ? sums.centered / count : 0.0;
  const double dweight = (sums.grad_centered - rounding * sums.grad) * inverse;
  if (t.dweight != nullptr) *t.dweight = static_cast<float>(dweight);
  if (t.dbias != nullptr) *t.dbias = static_cast<float>(sums.grad);
  const double scale = (t.weight != nullptr ? *t.weight : 1.0) * inverse;
  if (!moves) return {static_cast<float>(scale), 0.0f, 0.0f};
  const double slope = -scale * inverse * dweight / count;
  const double offset = -scale * sums.grad / count - slope * rounding;
  return {static_cast<float>(scale), static_cast<float>(slope), static_cast<float>(offset)};
}

namespace {

constexpr int kSums = 2;  // accumulators of each of the three sums

enum Mask { kNoMask, kMaskFromX, kMaskFromY };

// What one pass over a stretch of a channel reads, and the constants of the channel.
struct Stretch {
  const float* grad;
  const float* x;
  const float* y;  // kMaskFromY only
  Affine affine;
};

// The gradient behind the ReLU: torch's threshold_backward.
template <Mask kMask>
SK_INLINE Vec Masked(const Stretch& s, Vec grad, Vec x, Vec y) {
  if (kMask == kMaskFromX) return vkeep_positive(grad, Apply(s.affine, x));
  if (kMask == kMaskFromY) return vkeep_positive(grad, y);
  return grad;
}

void Add(GradientSums& a, const GradientSums& b) {
  a.grad += b.grad;
  a.grad_centered += b.grad_centered;
  a.centered += b.centered;
}

template <Mask kMask>
GradientSums ChunkSums(const Stretch& s, int64_t at, int64_t n, float mean) {
  Vec grad[kSums], grad_centered[kSums], centered[kSums];
  for (int k = 0; k < kSums; ++k) grad[k] = grad_centered[k] = centered[k] = vzero();
  const float* grads = s.grad + at;
  const float* xs = s.x + at;
  const float* ys = kMask == kMaskFromY ? s.y + at : nullptr;
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const int64_t j = i + k * kLanes;
      const Vec x = vload(xs + j), y = kMask == kMaskFromY ? vload(ys + j) : vzero();
      const Vec g = Masked<kMask>(s, vload(grads + j), x, y);
      const Vec deviation = vsub(x, s.affine.center);
      grad[k] = vadd(grad[k], g);
      grad_centered[k] = vfma(g, deviation, grad_centered[k]);
      centered[k] = vadd(centered[k], deviation);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = imin<int64_t>(n - i, kLanes);
    const Vec x = LoadTail(xs + i, left, mean);
    const Vec y = kMask == kMaskFromY ? LoadTail(ys + i, left, 0) : vzero();
    const Vec g = Masked<kMask>(s, LoadTail(grads + i, left, 0), x, y);
    const Vec deviation = vsub(x, s.affine.center);
    grad[0] = vadd(grad[0], g);
    grad_centered[0] = vfma(g, deviation, grad_centered[0]);
    centered[0] = vadd(centered[0], deviation);
  }
  return {SumLanes(grad), SumLanes(grad_centered), SumLanes(centered)};
}

template <Mask kMask>
GradientSums PartSums(const Stretch& s, int64_t n, float mean) {
  GradientSums total = {0, 0, 0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    Add(total, ChunkSums<kMask>(s, begin, imin(kChunk, n - begin), mean));
  }
  return total;
}

// Either of dx and dresidual (= g) may be null.
template <Mask kMask, bool kStream>
void WriteAs(float* dx, float* dresidual, const Stretch& stretch, int64_t n, const Slope& line) {
  const Stretch s = stretch;
  const Vec scale = vset1(&line.scale), slope = vset1(&line.slope), offset = vset1(&line.offset);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = vload(s.x + i), y = kMask == kMaskFromY ? vload(s.y + i) : vzero();
    const Vec g = Masked<kMask>(s, vload(s.grad + i), x, y);
    const Vec deviation = vsub(x, s.affine.center);
    if (dx != nullptr) Put<kStream>(dx + i, vfma(g, scale, vfma(deviation, slope, offset)));
    if (dresidual != nullptr) Put<kStream>(dresidual + i, g);
  }
  if (i == n) return;
  const int64_t left = n - i;
  const Vec x = LoadTail(s.x + i, left, 0);
  const Vec y = kMask == kMaskFromY ? LoadTail(s.y + i, left, 0) : vzero();
  const Vec g = Masked<kMask>(s, LoadTail(s.grad + i, left, 0), x, y);
  const Vec deviation = vsub(x, s.affine.center);
  if (dx != nullptr) StoreTail(dx + i, vfma(g, scale, vfma(deviation, slope, offset)), left);
  if (dresidual != nullptr) StoreTail(dresidual + i, g, left);
}

struct BackwardKernels {
  GradientSums (*sums)(const Stretch&, int64_t, float);
  void (*write)(float*, float*, const Stretch&, int64_t, const Slope&);
};

template <Mask kMask>
BackwardKernels KernelsOf(bool stream) {
  return {PartSums<kMask>, stream ? WriteAs<kMask, true> : WriteAs<kMask, false>};
}

// One backward pass: what does not change from channel to channel.
struct Backward {
  const BatchNormBackwardArgs& args;
  BackwardKernels kernels;
  Parts parts;
};

Stretch StretchAt(const BatchNormBackwardArgs& args, int64_t channel, int64_t begin) {
  const int64_t at = channel * args.count + begin;
  const float scale =
      static_cast<float>(ScaleOf(args.weight, args.var[channel], args.eps, channel));
  const float offset = args.offset != nullptr ? args.offset[channel] : 0.0f;
  return {args.grad + at, args.x + at, args.y != nullptr ? args.y + at : nullptr,
          MakeAffine(args.mean[channel], scale, offset)};
}

GradientSums SumsOfPart(const Backward& b, int64_t channel, int64_t part) {
  const int64_t begin = part * b.parts.length;
  return b.kernels.sums(StretchAt(b.args, channel, begin),
                        imin(b.parts.length, b.args.count - begin), b.args.mean[channel]);
}

void WritePart(const Backward& b, int64_t channel, int64_t part, const Slope& slope) {
  const int64_t begin = part * b.parts.length, at = channel * b.args.count + begin;
  b.kernels.write(b.args.dx != nullptr ? b.args.dx + at : nullptr,
                  b.args.dresidual != nullptr ? b.args.dresidual + at : nullptr,
                  StretchAt(b.args, channel, begin), imin(b.parts.length, b.args.count - begin),
                  slope);
}

Slope Settle(const BatchNormBackwardArgs& args, int64_t channel, const GradientSums& sums) {
  const auto at = [channel](auto* pointer) {
    return pointer != nullptr ? pointer + channel : pointer;
  };
  return SettleGradient({at(args.dweight), at(args.dbias), at(args.weight), args.var[channel],
                         args.eps, args.count, args.training},
                        sums);
}

void BackwardChannel(const Backward& b, int64_t channel) {
  GradientSums total = {0, 0, 0};
  for (int64_t part = 0; part < b.parts.number; ++part) Add(total, SumsOfPart(b, channel, part));
  const Slope slope = Settle(b.args, channel, total);
  for (int64_t part = 0; part < b.parts.number; ++part) WritePart(b, channel, part, slope);
}

// The same with all threads on one channel.
void BackwardSplit(const Backward& b, int64_t channel) {
  GradientSums of_part[kMaxParts], total = {0, 0, 0};
#pragma omp parallel for schedule(static) num_threads(b.args.threads)
  for (int64_t part = 0; part < b.parts.number; ++part) {
    of_part[part] = SumsOfPart(b, channel, part);
  }
  for (int64_t part = 0; part < b.parts.number; ++part) Add(total, of_part[part]);
  const Slope slope = Settle(b.args, channel, total);
#pragma omp parallel for schedule(static) num_threads(b.args.threads)
  for (int64_t part = 0; part < b.parts.number; ++part) {
    WritePart(b, channel, part, slope);
    vfence();
  }
}

BackwardKernels Choose(const BatchNormBackwardArgs& args) {
  // A pointer that is null is no reason not to stream the other.
  const bool stream = Streams(args.dx, args.channels, args.count) &&
                      Streams(args.dresidual, args.channels, args.count);
  if (!args.relu) return KernelsOf<kNoMask>(stream);
  return args.y != nullptr ? KernelsOf<kMaskFromY>(stream) : KernelsOf<kMaskFromX>(stream);
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardArgs& args) {
  const Backward b = {args, Choose(args), PartsOf(args.count)};
  if (SplitsChannels(args.channels, args.count, args.threads)) {
    for (int64_t channel = 0; channel < args.channels; ++channel) BackwardSplit(b, channel);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) {
    BackwardChannel(b, channel);
    vfence();
  }
}

}  // namespace SK_ISA
}  // namespace sk
