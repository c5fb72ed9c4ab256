// Batch norm, ReLU and 2 x 2 max pooling: the normalised image, four times the size of what is kept
// of it, is never written, nor is its gradient. The statistics are those of norm.cuh.
#include "cuda/norm.cuh"

namespace sk::cuda {
namespace {

constexpr int kSide = 2;

// One channel, in 32 bits.
struct Halved {
  int batch, width, rows, cols;  // width of x, rows and columns of y
  int points, out_points;        // elements of x and of y

  // The upper left pixel's place in x of element i of y.
  __device__ int Corner(int i) const {
    const int pixel = i / batch;
    return (pixel / cols * kSide * width + pixel % cols * kSide) * batch + i % batch;
  }
  __device__ int Tap(int tap) const { return (tap / kSide * width + tap % kSide) * batch; }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormPoolKernel(T* __restrict__ y, uint8_t* __restrict__ argmax, const T* __restrict__ x,
                   const float* __restrict__ weight, const float* __restrict__ bias,
                   const float* __restrict__ mean, const float* __restrict__ var,
                   const float* __restrict__ rounding, Halved size, float eps) {
  const int channel = static_cast<int>(blockIdx.x);
  const float scale = ScaleOf(weight, var[channel], eps, channel);
  const double add = bias != nullptr ? bias[channel] : 0.0;
  const double lost = rounding[channel];
  const Affine affine = {mean[channel], scale, static_cast<float>(add - lost * scale)};
  const T* image = x + static_cast<int64_t>(channel) * size.points;
  const int64_t row = static_cast<int64_t>(channel) * size.out_points;
  for (int64_t i = FirstElement<kWidth>(); i < size.out_points; i += ElementStep<kWidth>()) {
    const T* corner = image + size.Corner(static_cast<int>(i));
    // Nothing wins over 0 but what is greater, and NaN: the ReLU.
    float best[kWidth] = {};
    int taps[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) taps[j] = kNoTap;
#pragma unroll
    for (int tap = 0; tap < kSide * kSide; ++tap) {
      float v[kWidth];
      Load<kWidth>(v, corner + size.Tap(tap));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float normed = affine(v[j]);
        const bool better = normed > best[j] || normed != normed;
        best[j] = better ? normed : best[j];
        taps[j] = better ? tap : taps[j];
      }
    }
    Store<kWidth>(y + (row + i), best);
    StoreTaps<kWidth>(argmax + (row + i), taps);
  }
}

// sums[channel][part] = {sum of g, of g * (x - mean), 0}, over the elements of y.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormPoolSumsKernel(float* __restrict__ to_sums, const T* __restrict__ grad,
                       const uint8_t* __restrict__ argmax, const T* __restrict__ x,
                       const float* __restrict__ mean, Halved size, int part) {
  const int channel = static_cast<int>(blockIdx.x);
  const int from = static_cast<int>(blockIdx.y) * part;
  const int to = from + min(size.out_points - from, part);
  const float middle = mean[channel];
  const T* image = x + static_cast<int64_t>(channel) * size.points;
  const int64_t row = static_cast<int64_t>(channel) * size.out_points;
  float sums[2] = {};
  for (int i = from + static_cast<int>(threadIdx.x) * kWidth; i < to; i += kDenseThreads * kWidth) {
    const T* corner = image + size.Corner(i);
    float g[kWidth];
    int taps[kWidth];
    Load<kWidth>(g, grad + (row + i));
    LoadTaps<kWidth>(taps, argmax + (row + i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (taps[j] == kNoTap) continue;
      float v[1];
      Load<1>(v, corner + (size.Tap(taps[j]) + j));
      sums[0] += g[j];
      sums[1] += g[j] * (v[0] - middle);
    }
  }
  BlockSums(sums);
  if (threadIdx.x != 0) return;
  float* to_part = to_sums + (static_cast<int64_t>(channel) * gridDim.y + blockIdx.y) * 3;
  to_part[0] = sums[0];
  to_part[1] = sums[1];
  to_part[2] = 0.0f;  // the rounding of the mean is given
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormPoolGradientKernel(T* __restrict__ dx, const T* __restrict__ grad,
                           const uint8_t* __restrict__ argmax, const T* __restrict__ x,
                           const float* __restrict__ slopes, const float* __restrict__ weight,
                           const float* __restrict__ mean, const float* __restrict__ var,
                           Halved size, float eps) {
  const int channel = static_cast<int>(blockIdx.x);
  const float middle = mean[channel], scale = ScaleOf(weight, var[channel], eps, channel);
  const float slope = slopes[2 * channel], add = slopes[2 * channel + 1];
  const int64_t row = static_cast<int64_t>(channel) * size.points;
  for (int64_t i = FirstElement<kWidth>(); i < size.points; i += ElementStep<kWidth>()) {
    const int pixel = static_cast<int>(i) / size.batch, n = static_cast<int>(i) % size.batch;
    const int py = pixel / size.width, px = pixel % size.width;
    float g[kWidth] = {}, v[kWidth];
    if (py / kSide < size.rows && px / kSide < size.cols) {  // else in no window
      const int64_t at = static_cast<int64_t>(channel) * size.out_points +
                         (static_cast<int64_t>(py / kSide) * size.cols + px / kSide) * size.batch;
      int taps[kWidth];
      Load<kWidth>(g, grad + (at + n));
      LoadTaps<kWidth>(taps, argmax + (at + n));
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (taps[j] != py % kSide * kSide + px % kSide) g[j] = 0.0f;
    }
    Load<kWidth>(v, x + (row + i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      g[j] = __fmaf_rn(g[j], scale, __fmaf_rn(v[j] - middle, slope, add));
    Store<kWidth>(dx + (row + i), g);
  }
}

// -- launchers
// -------------------------------------------------------------------------------------

template <typename Args>
Halved SizeOf(const Args& a) {
  const int batch = static_cast<int>(a.batch), width = static_cast<int>(a.width);
  const int rows = static_cast<int>(a.height) / kSide, cols = width / kSide;
  return {
      batch, width, rows, cols, static_cast<int>(a.height) * width * batch, rows * cols * batch};
}

template <typename Args>
DenseCall Describe(const char* name, const Args& a) {
  return {name, a.channels, a.height * a.width * a.batch, a.element, a.place.device};
}

template <typename Args>
void Serve(const DenseCall& what, const Args& a) {
  ServeDense(what);
  if (a.height < kSide || a.width < kSide)
    throw std::invalid_argument(what() + ": expected an image of at least 2 x 2 pixels, got " +
                                std::to_string(a.height) + " x " + std::to_string(a.width));
}

template <typename T, int kWidth>
void Forward(const DenseCall& what, const NormPoolArgs& a) {
  const Halved size = SizeOf(a);
  const NormParts parts = PartsOf(size.points);
  if (a.training && size.points > 0)
    Launch(what, NormMomentsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream),
           a.workspace, static_cast<const T*>(a.x), size.points, parts.length);
  Launch(what, NormSettleKernel, OfChannels(a.channels, a.place.stream), a.mean, a.var,
         static_cast<float*>(nullptr), a.rounding, a.weight, a.bias,
         static_cast<const float*>(a.workspace), static_cast<int>(a.channels), size.points,
         parts.length, parts.number, a.training, a.eps);
  if (size.points == 0) return;
  Launch(what, NormPoolKernel<T, kWidth>,
         DenseShape(a.channels, size.out_points, kWidth, a.place.stream), static_cast<T*>(a.y),
         a.argmax, static_cast<const T*>(a.x), a.weight, a.bias, static_cast<const float*>(a.mean),
         static_cast<const float*>(a.var), static_cast<const float*>(a.rounding), size, a.eps);
}

template <typename T, int kWidth>
void Backward(const DenseCall& what, const NormPoolBackwardArgs& a) {
  const Halved size = SizeOf(a);
  const NormParts parts = PartsOf(size.out_points);
  float* sums = a.workspace + 2 * a.channels;  // after the slopes
  const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  if (size.points > 0)
    Launch(what, NormPoolSumsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream), sums,
           grad, a.argmax, x, a.mean, size, parts.length);
  Launch(what, NormSlopeKernel, OfChannels(a.channels, a.place.stream), a.dweight, a.dbias,
         a.workspace, static_cast<const float*>(sums), a.weight, a.var, a.rounding,
         static_cast<int>(a.channels), size.points, parts.number, a.training, a.eps);
  if (size.points == 0) return;
  Launch(what, NormPoolGradientKernel<T, kWidth>,
         DenseShape(a.channels, size.points, kWidth, a.place.stream), static_cast<T*>(a.dx), grad,
         a.argmax, x, static_cast<const float*>(a.workspace), a.weight, a.mean, a.var, size, a.eps);
}

}  // namespace

void norm_pool(const NormPoolArgs& a) {
  const DenseCall what = Describe("batch_norm_pool", a);
  Serve(what, a);
  ServeWorkspace(what, norm_workspace(a.channels, what.count, a.training), a.workspace_bytes);
  if (a.channels == 0) return;
  DeviceGuard guard(a.place.device, what);
  const bool wide =
      Wide(a.element, a.batch, a.y, a.x) && reinterpret_cast<uintptr_t>(a.argmax) % 4 == 0;
  ForType(a.element, [&](auto element) {
    using T = decltype(element);
    if (wide) return Forward<T, 4>(what, a);
    Forward<T, 1>(what, a);
  });
}

void norm_pool_backward(const NormPoolBackwardArgs& a) {
  const DenseCall what = Describe("batch_norm_pool_backward", a);
  Serve(what, a);
  const int64_t out = a.height / kSide * (a.width / kSide) * a.batch;
  ServeWorkspace(what, norm_backward_workspace(a.channels, out), a.workspace_bytes);
  if (a.channels == 0) return;
  DeviceGuard guard(a.place.device, what);
  const bool wide =
      Wide(a.element, a.batch, a.dx, a.grad, a.x) && reinterpret_cast<uintptr_t>(a.argmax) % 4 == 0;
  ForType(a.element, [&](auto element) {
    using T = decltype(element);
    if (wide) return Backward<T, 4>(what, a);
    Backward<T, 1>(what, a);
  });
}

}  // namespace sk::cuda
