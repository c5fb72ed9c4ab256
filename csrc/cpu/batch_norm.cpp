// Batch norm over feature-major activations, where a channel's elements are contiguous.
//
// One thread computes one channel, in fixed chunks, so the result does not depend on the threads.
// A chunk stays in L1: its mean is found first and the second moment is taken about it, then chunks
// are merged in double (Chan, Golub, LeVeque 1979). A sum of squares about zero would lose all its
// digits where the mean is large against the deviation.
#include <cstdint>

#include "kernels_dense.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kChunk = 2048;
constexpr int kLanes = 16;

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

inline double SqrtOf(double value) { return __builtin_sqrt(value); }

// Sum over `n` elements of term(i), in kLanes float lanes that are added up in double. The order of
// the additions is a function of n alone.
template <typename Term>
inline double LaneSum(int64_t n, Term term) {
  float lanes[kLanes] = {};
  const int64_t full = n - n % kLanes;
  for (int64_t i = 0; i < full; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (int64_t i = full; i < n; ++i) sum += term(i);
  return sum;
}

struct Moments {
  double mean;
  double squares;  // sum of squared deviations from the mean
};

Moments ChunkMoments(const float* x, int64_t n) {
  const float shift = static_cast<float>(LaneSum(n, [x](int64_t i) { return x[i]; }) / n);
  // `shift` is a rounded mean; the first moment about it corrects both results.
  const double first = LaneSum(n, [x, shift](int64_t i) { return x[i] - shift; });
  const double second = LaneSum(n, [x, shift](int64_t i) {
    const float deviation = x[i] - shift;
    return deviation * deviation;
  });
  return {shift + first / n, second - first * first / n};
}

Moments ChannelMoments(const float* x, int64_t count) {
  Moments total = {0, 0};
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = Min(kChunk, count - begin);
    const Moments chunk = ChunkMoments(x + begin, n);
    const double delta = chunk.mean - total.mean;
    const double merged = static_cast<double>(begin + n);
    total.mean += delta * (n / merged);
    total.squares += chunk.squares + delta * delta * (begin * (n / merged));
  }
  return total;
}

// y = (x - center) * scale + offset [+ residual], then ReLU. NaN passes through the ReLU.
template <bool kResidual, bool kRelu>
void NormalizeAs(float* y, const float* x, const float* residual, int64_t count, float center,
                 float scale, float offset) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float value = (x[i] - center) * scale + offset;
    if (kResidual) value += residual[i];
    y[i] = kRelu && value < 0.0f ? 0.0f : value;
  }
}

void Normalize(float* y, const float* x, const float* residual, int64_t count, float center,
               float scale, float offset, bool relu) {
  if (residual != nullptr) {
    if (relu) return NormalizeAs<true, true>(y, x, residual, count, center, scale, offset);
    return NormalizeAs<true, false>(y, x, residual, count, center, scale, offset);
  }
  if (relu) return NormalizeAs<false, true>(y, x, residual, count, center, scale, offset);
  return NormalizeAs<false, false>(y, x, residual, count, center, scale, offset);
}

struct GradientSums {
  double grad;           // sum of g, the gradient behind the ReLU
  double grad_centered;  // sum of g * (x - mean)
  double centered;       // sum of x - mean: not 0, since mean was rounded to float
};

template <bool kRelu>
GradientSums SumGradientAs(const float* grad, const float* x, const float* y, int64_t count,
                           float mean) {
  GradientSums total = {0, 0, 0};
  const auto masked = [grad, y](int64_t i) { return kRelu && y[i] <= 0.0f ? 0.0f : grad[i]; };
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = Min(kChunk, count - begin);
    total.grad += LaneSum(n, [=](int64_t i) { return masked(begin + i); });
    total.grad_centered +=
        LaneSum(n, [=](int64_t i) { return masked(begin + i) * (x[begin + i] - mean); });
    total.centered += LaneSum(n, [=](int64_t i) { return x[begin + i] - mean; });
  }
  return total;
}

GradientSums SumGradient(const BatchNormBackwardArgs& args, int64_t channel) {
  const int64_t base = channel * args.count;
  const float mean = args.mean[channel];
  if (args.relu) {
    return SumGradientAs<true>(args.grad + base, args.x + base, args.y + base, args.count, mean);
  }
  return SumGradientAs<false>(args.grad + base, args.x + base, nullptr, args.count, mean);
}

// dx = g * scale - (x - mean) * slope - offset; dresidual = g. Either may be null.
template <bool kRelu>
void WriteGradientAs(float* dx, float* dresidual, const float* grad, const float* x, const float* y,
                     int64_t count, float mean, float scale, float slope, float offset) {
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = Min(begin + kChunk, count);
    if (dx != nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float g = kRelu && y[i] <= 0.0f ? 0.0f : grad[i];
        dx[i] = g * scale - ((x[i] - mean) * slope + offset);
      }
    }
    if (dresidual != nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        dresidual[i] = kRelu && y[i] <= 0.0f ? 0.0f : grad[i];
      }
    }
  }
}

void BackwardChannel(const BatchNormBackwardArgs& args, int64_t channel) {
  const int64_t base = channel * args.count;
  const GradientSums sums = SumGradient(args, channel);
  const double inverse = 1.0 / SqrtOf(static_cast<double>(args.var[channel]) + args.eps);
  const double weight = args.weight != nullptr ? args.weight[channel] : 1.0;
  const double count = static_cast<double>(args.count);
  // Eval uses the given mean as a constant; in training the exact mean is mean + rounding.
  const double rounding = args.training && args.count > 0 ? sums.centered / count : 0.0;
  const double dweight = (sums.grad_centered - rounding * sums.grad) * inverse;
  if (args.dweight != nullptr) args.dweight[channel] = static_cast<float>(dweight);
  if (args.dbias != nullptr) args.dbias[channel] = static_cast<float>(sums.grad);

  const double scale = weight * inverse;
  double slope = 0, offset = 0;
  if (args.training && args.count > 0) {
    slope = scale * inverse * dweight / count;
    offset = scale * sums.grad / count - slope * rounding;
  }
  float* dx = args.dx != nullptr ? args.dx + base : nullptr;
  float* dresidual = args.dresidual != nullptr ? args.dresidual + base : nullptr;
  const auto write = args.relu ? WriteGradientAs<true> : WriteGradientAs<false>;
  write(dx, dresidual, args.grad + base, args.x + base, args.relu ? args.y + base : nullptr,
        args.count, args.mean[channel], static_cast<float>(scale), static_cast<float>(slope),
        static_cast<float>(offset));
}

void ForwardChannel(const BatchNormForwardArgs& args, int64_t channel) {
  const int64_t base = channel * args.count;
  const float* x = args.x + base;
  double var, rounding = 0;
  if (args.training) {
    const Moments moments = ChannelMoments(x, args.count);
    var = args.count > 0 ? moments.squares / static_cast<double>(args.count) : 0.0;
    args.mean[channel] = static_cast<float>(moments.mean);
    args.var[channel] = static_cast<float>(var);
    rounding = moments.mean - static_cast<double>(args.mean[channel]);
  } else {
    var = args.var[channel];
  }
  const double weight = args.weight != nullptr ? args.weight[channel] : 1.0;
  const double bias = args.bias != nullptr ? args.bias[channel] : 0.0;
  const double scale = weight / SqrtOf(var + args.eps);
  const float* residual = args.residual != nullptr ? args.residual + base : nullptr;
  Normalize(args.y + base, x, residual, args.count, args.mean[channel], static_cast<float>(scale),
            static_cast<float>(bias - rounding * scale), args.relu);
}

}  // namespace

void batch_norm_forward(const BatchNormForwardArgs& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) ForwardChannel(args, channel);
}

void batch_norm_backward(const BatchNormBackwardArgs& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.channels; ++channel) BackwardChannel(args, channel);
}

}  // namespace SK_ISA
}  // namespace sk
