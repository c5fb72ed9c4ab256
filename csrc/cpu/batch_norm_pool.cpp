// Batch norm, ReLU and 2 x 2 max pooling in one pass: the normalised image, four times the size of
// what is kept of it, is never written, nor is its gradient.
//
// A channel is one thread's work, and its sums are cut by the sizes alone, so that the result does
// not depend on the threads.
#include <cstdint>

#include "batch_norm.h"
#include "kernels_dense.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kTaps = 4;

// Additions to one float lane before the sums move on to double.
constexpr int64_t kRun = 128;

constexpr float kNoTapNumber = kNoTap;

// The four pixels of a window, `lanes` batch elements each: offsets from the upper left one.
struct Window {
  int64_t offset[kTaps];
};

Window WindowOf(int64_t width, int64_t batch) {
  return {{0, batch, width * batch, (width + 1) * batch}};
}

struct Winner {
  Vec value, tap;
};

// The ReLU of the window's maximum and its tap. Only a positive (or NaN) maximum has one, so the
// first tap stands for "greater than 0", and what follows needs no ReLU of its own.
SK_INLINE Winner Maximum(const Affine& affine, const Vec (&x)[kTaps]) {
  Winner best = {vzero(), vset1(&kNoTapNumber)};
  for (int t = 0; t < kTaps; ++t) {
    const float number = static_cast<float>(t);
    const Vec value = Apply(affine, x[t]);
    best.tap = vwinner(value, best.value, vset1(&number), best.tap);
    best.value = vwinner(value, best.value, value, best.value);
  }
  return best;
}

void PoolWindow(float* y, uint8_t* argmax, const float* x, const Window& window, int64_t batch,
                const Affine& constants) {
  const Affine affine = constants;
  Vec values[kTaps];
  int64_t n = 0;
  for (; n + kLanes <= batch; n += kLanes) {
    for (int t = 0; t < kTaps; ++t) values[t] = vload(x + window.offset[t] + n);
    const Winner best = Maximum(affine, values);
    vstore(y + n, best.value);
    vstore_bytes(argmax + n, best.tap);
  }
  if (n == batch) return;
  for (int t = 0; t < kTaps; ++t) values[t] = LoadTail(x + window.offset[t] + n, batch - n, 0);
  const Winner best = Maximum(affine, values);
  uint8_t taps[kLanes];
  vstore_bytes(taps, best.tap);
  StoreTail(y + n, best.value, batch - n);
  std::memcpy(argmax + n, taps, batch - n);
}

void ForwardChannel(const BatchNormPoolArgs& args, int64_t channel) {
  const int64_t count = args.height * args.width * args.batch;
  const float* x = args.x + channel * count;
  double rounding = 0;
  if (args.training) {
    const Moments moments = ChannelMoments(x, count);
    args.mean[channel] = static_cast<float>(moments.mean);
    args.var[channel] = static_cast<float>(count > 0 ? moments.squares / moments.count : 0.0);
    rounding = moments.mean - static_cast<double>(args.mean[channel]);
  }
  args.rounding[channel] = static_cast<float>(rounding);
  const double scale = ScaleOf(args.weight, args.var[channel], args.eps, channel);
  const double bias = args.bias != nullptr ? args.bias[channel] : 0.0;
  const Affine affine = MakeAffine(args.mean[channel], static_cast<float>(scale),
                                   static_cast<float>(bias - rounding * scale));
  const Window window = WindowOf(args.width, args.batch);
  const int64_t rows = args.height / 2, cols = args.width / 2;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const int64_t out = ((channel * rows + row) * cols + col) * args.batch;
      PoolWindow(args.y + out, args.argmax + out, x + 2 * (row * args.width + col) * args.batch,
                 window, args.batch, affine);
    }
  }
}

struct Sums {
  Vec grad[kTaps], grad_centered[kTaps];
};

// Adds one window's gradients; x is missing (`fill`) and grad is 0 beyond the batch.
SK_INLINE void AddGradient(Sums& sums, Vec grad, Vec tap, const Vec (&x)[kTaps], Vec mean) {
  for (int t = 0; t < kTaps; ++t) {
    const float number = static_cast<float>(t);
    const Vec g = vkeep_equal(grad, tap, vset1(&number));
    sums.grad[t] = vadd(sums.grad[t], g);
    sums.grad_centered[t] = vfma(g, vsub(x[t], mean), sums.grad_centered[t]);
  }
}

SK_INLINE Vec LoadTailBytes(const uint8_t* p, int64_t n) {
  uint8_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kNoTap;
  std::memcpy(lanes, p, n);
  return vload_bytes(lanes);
}

struct Channel {
  const float* grad;
  const uint8_t* argmax;
  const float* x;
  float mean;
  Window window;
  int64_t rows, cols;  // of the output
  int64_t width, batch;
};

// Sums over the windows [begin, end) of one output row.
GradientSums RunSums(const Channel& c, int64_t row, int64_t begin, int64_t end) {
  const Vec mean = vset1(&c.mean);
  Sums sums;
  Vec x[kTaps];
  for (int t = 0; t < kTaps; ++t) sums.grad[t] = sums.grad_centered[t] = vzero();
  for (int64_t col = begin; col < end; ++col) {
    const float* grad = c.grad + (row * c.cols + col) * c.batch;
    const uint8_t* argmax = c.argmax + (row * c.cols + col) * c.batch;
    const float* pixel = c.x + 2 * (row * c.width + col) * c.batch;
    int64_t n = 0;
    for (; n + kLanes <= c.batch; n += kLanes) {
      for (int t = 0; t < kTaps; ++t) x[t] = vload(pixel + c.window.offset[t] + n);
      AddGradient(sums, vload(grad + n), vload_bytes(argmax + n), x, mean);
    }
    if (n == c.batch) continue;
    const int64_t left = c.batch - n;
    for (int t = 0; t < kTaps; ++t) x[t] = LoadTail(pixel + c.window.offset[t] + n, left, c.mean);
    AddGradient(sums, LoadTail(grad + n, left, 0), LoadTailBytes(argmax + n, left), x, mean);
  }
  return {SumLanes(sums.grad), SumLanes(sums.grad_centered), 0};
}

GradientSums ChannelSums(const Channel& c) {
  GradientSums total = {0, 0, 0};
  const int64_t run = imax<int64_t>(kRun * kLanes / imax<int64_t>(c.batch, 1), 1);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t begin = 0; begin < c.cols; begin += run) {
      const GradientSums sums = RunSums(c, row, begin, imin(begin + run, c.cols));
      total.grad += sums.grad;
      total.grad_centered += sums.grad_centered;
    }
  }
  return total;
}

// dx of one pixel: of a tap of a window, or (grad null) of a pixel that no window holds.
template <bool kStream>
void WritePixel(float* dx, const float* x, const float* grad, const uint8_t* argmax, int tap,
                int64_t batch, float mean, const Slope& line) {
  const float number = static_cast<float>(tap);
  const Vec center = vset1(&mean), taps = vset1(&number);
  const Vec scale = vset1(&line.scale), slope = vset1(&line.slope), offset = vset1(&line.offset);
  int64_t n = 0;
  for (; n + kLanes <= batch; n += kLanes) {
    const Vec rest = vfma(vsub(vload(x + n), center), slope, offset);
    const Vec g =
        grad == nullptr ? vzero() : vkeep_equal(vload(grad + n), vload_bytes(argmax + n), taps);
    Put<kStream>(dx + n, vfma(g, scale, rest));
  }
  if (n == batch) return;
  const int64_t left = batch - n;
  const Vec rest = vfma(vsub(LoadTail(x + n, left, mean), center), slope, offset);
  const Vec g = grad == nullptr ? vzero()
                                : vkeep_equal(LoadTail(grad + n, left, 0),
                                              LoadTailBytes(argmax + n, left), taps);
  StoreTail(dx + n, vfma(g, scale, rest), left);
}

template <bool kStream>
void WriteChannel(float* dx, const Channel& c, int64_t height, const Slope& line) {
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < c.width; ++x) {
      const int64_t at = (y * c.width + x) * c.batch;
      const int64_t out = (y / 2 * c.cols + x / 2) * c.batch;
      const bool inside = y / 2 < c.rows && x / 2 < c.cols;
      WritePixel<kStream>(dx + at, c.x + at, inside ? c.grad + out : nullptr, c.argmax + out,
                          static_cast<int>(y % 2 * 2 + x % 2), c.batch, c.mean, line);
    }
  }
}

void BackwardChannel(const BatchNormPoolBackwardArgs& args, int64_t channel, bool stream) {
  const int64_t count = args.height * args.width * args.batch;
  const int64_t rows = args.height / 2, cols = args.width / 2;
  const int64_t out = channel * rows * cols * args.batch;
  const Channel c = {args.grad + out,
                     args.argmax + out,
                     args.x + channel * count,
                     args.mean[channel],
                     WindowOf(args.width, args.batch),
                     rows,
                     cols,
                     args.width,
                     args.batch};
  GradientSums sums = ChannelSums(c);
  sums.centered = static_cast<double>(args.rounding[channel]) * static_cast<double>(count);
  const Slope line = SettleGradient({args.dweight != nullptr ? args.dweight + channel : nullptr,
                                     args.dbias != nullptr ? args.dbias + channel : nullptr,
                                     args.weight != nullptr ? args.weight + channel : nullptr,
                                     args.var[channel], args.eps, count, args.training},
                                    sums);
  float* dx = args.dx + channel * count;
  if (stream) {
    WriteChannel<true>(dx, c, args.height, line);
  } else {
    WriteChannel<false>(dx, c, args.height, line);
  }
}

}  // namespace

void batch_norm_pool(const BatchNormPoolArgs& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) ForwardChannel(args, channel);
}

void batch_norm_pool_backward(const BatchNormPoolBackwardArgs& args) {
  const bool stream = Streams(args.dx, args.channels * args.height * args.width, args.batch);
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) {
    BackwardChannel(args, channel, stream);
    vfence();
  }
}

}  // namespace SK_ISA
}  // namespace sk
