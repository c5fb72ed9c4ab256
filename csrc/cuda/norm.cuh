// Batch norm: sums of parts of a channel, one thread per channel that settles them in double, one
// pass that writes. Parts depend on the channel's length alone, and are added up in order.
#pragma once

#include <cmath>

#include "cuda/dense.cuh"

namespace sk::cuda {

template <int kCount>
struct WarpSums {
  float of[kDenseThreads / kWarp][kCount];
};

// Adds each of sums[] over the threads of the block, in an order of its own; all get the result.
// Once in a kernel for each kCount: no barrier stands between this and another use of its place.
template <int kCount>
__device__ __forceinline__ void BlockSums(float (&sums)[kCount]) {
  WarpSums<kCount>& shared = StaticShared<WarpSums<kCount>>();
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int bit = kWarp / 2; bit > 0; bit /= 2)
      sums[i] += __shfl_xor_sync(kAllLanes, sums[i], bit);
    if (thread % kWarp == 0) shared.of[thread / kWarp][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = 0.0f;
    for (int warp = 0; warp < kDenseThreads / kWarp; ++warp) sums[i] += shared.of[warp][i];
  }
}

// Of one channel: y = (x - mean) * scale + offset. Forward and backward both come here, so that the
// backward pass finds the very value that the forward pass clipped.
struct Affine {
  float mean, scale, offset;
  __device__ float operator()(float x) const { return __fmaf_rn(x - mean, scale, offset); }
};

__device__ __forceinline__ float ScaleOf(const float* weight, float var, float eps, int channel) {
  return (weight != nullptr ? weight[channel] : 1.0f) / sqrtf(var + eps);
}

// moments[channel][part] = {a mean, the sum of what is left, the sum of its squares}.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormMomentsKernel(float* __restrict__ moments, const T* __restrict__ x, int count, int part) {
  const int from = static_cast<int>(blockIdx.y) * part;
  const int to = from + min(count - from, part);  // from + part may wrap near 2^31
  const T* row = x + static_cast<int64_t>(blockIdx.x) * count;
  const int first = from + static_cast<int>(threadIdx.x) * kWidth;
  float sum[1] = {};
  for (int i = first; i < to; i += kDenseThreads * kWidth) {
    float v[kWidth];
    Load<kWidth>(v, row + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[0] += v[j];
  }
  BlockSums(sum);
  const float mean = sum[0] / static_cast<float>(to - from);
  float left[2] = {};
  for (int i = first; i < to; i += kDenseThreads * kWidth) {
    float v[kWidth];
    Load<kWidth>(v, row + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float deviation = v[j] - mean;
      left[0] += deviation;
      left[1] += deviation * deviation;
    }
  }
  BlockSums(left);
  if (threadIdx.x != 0) return;
  float* to_moments = moments + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * 3;
  to_moments[0] = mean;
  to_moments[1] = left[0];
  to_moments[2] = left[1];
}

// One thread per channel: mean, var when training, and of offset and rounding the one that is asked
// for. The exact mean is mean + rounding.
inline __global__ void __launch_bounds__(kDenseThreads)
    NormSettleKernel(float* mean, float* var, float* __restrict__ offset,
                     float* __restrict__ rounding, const float* __restrict__ weight,
                     const float* __restrict__ bias, const float* __restrict__ moments,
                     int channels, int count, int part, int parts, bool training, float eps) {
  const int channel = static_cast<int>(blockIdx.x) * kDenseThreads + threadIdx.x;
  if (channel >= channels) return;
  const float add = bias != nullptr ? bias[channel] : 0.0f;
  if (!training) {
    if (offset != nullptr) offset[channel] = add;
    if (rounding != nullptr) rounding[channel] = 0.0f;
    return;
  }
  double seen = 0, middle = 0, squares = 0;  // Chan, Golub and LeVeque: merging two samples
  for (int p = 0; p < parts; ++p) {
    const float* m = moments + (static_cast<int64_t>(channel) * parts + p) * 3;
    const double size = min(part, count - p * part), left = m[1];
    const double delta = m[0] + left / size - middle, all = seen + size;
    middle += delta * size / all;
    squares += m[2] - left * left / size + delta * delta * seen * size / all;
    seen = all;
  }
  const double exact = count > 0 ? middle : static_cast<double>(NAN);
  const float variance = static_cast<float>((squares > 0 ? squares : 0) / seen);
  mean[channel] = static_cast<float>(exact);
  var[channel] = variance;
  const double lost = exact - static_cast<double>(static_cast<float>(exact));
  if (rounding != nullptr) rounding[channel] = static_cast<float>(lost);
  if (offset != nullptr)
    offset[channel] = static_cast<float>(add - lost * ScaleOf(weight, variance, eps, channel));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormApplyKernel(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ residual,
                    const float* __restrict__ weight, const float* __restrict__ mean,
                    const float* __restrict__ var, const float* __restrict__ offset, int count,
                    float eps, bool relu) {
  const int channel = static_cast<int>(blockIdx.x);
  const Affine affine = {mean[channel], ScaleOf(weight, var[channel], eps, channel),
                         offset[channel]};
  const int64_t row = static_cast<int64_t>(channel) * count;
  for (int64_t i = FirstElement<kWidth>(); i < count; i += ElementStep<kWidth>()) {
    float v[kWidth], add[kWidth] = {};
    Load<kWidth>(v, x + (row + i));
    if (residual != nullptr) Load<kWidth>(add, residual + (row + i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      v[j] = affine(v[j]) + add[j];
      if (relu && v[j] < 0.0f) v[j] = 0.0f;  // not fmaxf, which would swallow NaN
    }
    Store<kWidth>(y + (row + i), v);
  }
}

// What the backward pass reads of one channel.
template <typename T>
struct NormGradient {
  const T* __restrict__ grad;
  const T* __restrict__ x;
  const T* __restrict__ y;  // null: the ReLU's mask is recomputed from x
  bool relu;

  // Gradients behind the ReLU, and x - mean.
  template <int kWidth>
  __device__ void Load(float (&g)[kWidth], float (&deviation)[kWidth], int64_t at,
                       const Affine& affine) const {
    float behind[kWidth], v[kWidth];
    cuda::Load<kWidth>(g, grad + at);
    cuda::Load<kWidth>(v, x + at);
    if (relu && y != nullptr) cuda::Load<kWidth>(behind, y + at);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      deviation[j] = v[j] - affine.mean;
      if (relu && (y != nullptr ? behind[j] : affine(v[j])) <= 0.0f) g[j] = 0.0f;
    }
  }
};

// sums[channel][part] = {sum of g, of g * (x - mean), of x - mean}: the last is not 0, since mean
// was rounded.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormSumsKernel(float* __restrict__ to_sums, NormGradient<T> gradient,
                   const float* __restrict__ weight, const float* __restrict__ mean,
                   const float* __restrict__ var, const float* __restrict__ offset, int count,
                   int part, float eps) {
  const int channel = static_cast<int>(blockIdx.x);
  const int from = static_cast<int>(blockIdx.y) * part;
  const int to = from + min(count - from, part);  // from + part may wrap near 2^31
  const Affine affine = {mean[channel], ScaleOf(weight, var[channel], eps, channel),
                         offset != nullptr ? offset[channel] : 0.0f};
  const int64_t row = static_cast<int64_t>(channel) * count;
  float sums[3] = {};
  for (int i = from + static_cast<int>(threadIdx.x) * kWidth; i < to; i += kDenseThreads * kWidth) {
    float g[kWidth], deviation[kWidth];
    gradient.template Load<kWidth>(g, deviation, row + i, affine);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      sums[0] += g[j];
      sums[1] += g[j] * deviation[j];
      sums[2] += deviation[j];
    }
  }
  BlockSums(sums);
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 3; ++i)
    to_sums[(static_cast<int64_t>(channel) * gridDim.y + blockIdx.y) * 3 + i] = sums[i];
}

// One thread per channel: dweight, dbias, and what dx = g * scale + (x - mean) * slope + offset is
// made of, slopes[channel] = {slope, offset}. Without `lost`, what the mean has lost by rounding,
// that is found from the sum of x - mean.
inline __global__ void __launch_bounds__(kDenseThreads)
    NormSlopeKernel(float* __restrict__ dweight, float* __restrict__ dbias,
                    float* __restrict__ slopes, const float* __restrict__ sums,
                    const float* __restrict__ weight, const float* __restrict__ var,
                    const float* __restrict__ lost, int channels, int count, int parts,
                    bool training, float eps) {
  const int channel = static_cast<int>(blockIdx.x) * kDenseThreads + threadIdx.x;
  if (channel >= channels) return;
  double total[3] = {};
  for (int p = 0; p < parts; ++p)
    for (int i = 0; i < 3; ++i)
      total[i] += sums[(static_cast<int64_t>(channel) * parts + p) * 3 + i];
  const double inverse = 1.0 / sqrt(static_cast<double>(var[channel]) + eps);
  // Evaluation uses the given mean as a constant; in training the exact mean is mean + rounding.
  const bool moves = training && count > 0;
  const double given = lost != nullptr ? lost[channel] : 0.0;
  const double rounding = !moves ? 0.0 : lost != nullptr ? given : total[2] / count;
  const double dw = count > 0 ? (total[1] - rounding * total[0]) * inverse : 0.0;
  const double scale = (weight != nullptr ? weight[channel] : 1.0f) * inverse;
  const double slope = moves ? -scale * inverse * dw / count : 0.0;
  dweight[channel] = static_cast<float>(dw);
  dbias[channel] = static_cast<float>(total[0]);
  slopes[2 * channel] = static_cast<float>(slope);
  slopes[2 * channel + 1] =
      static_cast<float>(moves ? -scale * total[0] / count - slope * rounding : 0.0);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    NormGradientKernel(T* __restrict__ dx, T* __restrict__ dresidual, NormGradient<T> gradient,
                       const float* __restrict__ slopes, const float* __restrict__ weight,
                       const float* __restrict__ mean, const float* __restrict__ var,
                       const float* __restrict__ offset, int count, float eps) {
  const int channel = static_cast<int>(blockIdx.x);
  const Affine affine = {mean[channel], ScaleOf(weight, var[channel], eps, channel),
                         offset != nullptr ? offset[channel] : 0.0f};
  const float slope = slopes[2 * channel], add = slopes[2 * channel + 1];
  const int64_t row = static_cast<int64_t>(channel) * count;
  for (int64_t i = FirstElement<kWidth>(); i < count; i += ElementStep<kWidth>()) {
    float g[kWidth], deviation[kWidth];
    gradient.template Load<kWidth>(g, deviation, row + i, affine);
    if (dresidual != nullptr) Store<kWidth>(dresidual + (row + i), g);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      g[j] = __fmaf_rn(g[j], affine.scale, __fmaf_rn(deviation[j], slope, add));
    Store<kWidth>(dx + (row + i), g);
  }
}

// -- what the launchers of norm.cu and norm_pool.cu share
// ------------------------------------------

// Parts of a channel, a function of its length alone.
struct NormParts {
  int length, number;
};
inline NormParts PartsOf(int64_t count) {
  const int64_t shortest = 4096, most = 64;
  const int64_t even = (count + most - 1) / most;
  const int64_t length = ((even < shortest ? shortest : even) + 1023) / 1024 * 1024;
  return {static_cast<int>(length), static_cast<int>((count + length - 1) / length)};
}

inline int64_t FloatBytes(int64_t count) { return count * static_cast<int64_t>(sizeof(float)); }

inline void ServeWorkspace(const DenseCall& what, int64_t expected, int64_t got) {
  if (got >= expected) return;
  throw std::invalid_argument(what() + ": expected a workspace of at least " +
                              std::to_string(expected) + " bytes, got " + std::to_string(got));
}

inline LaunchShape OfChannels(int64_t channels, void* stream) {
  const int64_t blocks = (channels + kDenseThreads - 1) / kDenseThreads;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kDenseThreads), 0, stream};
}

inline LaunchShape OfParts(int64_t channels, const NormParts& parts, void* stream) {
  return {dim3(static_cast<unsigned>(channels), static_cast<unsigned>(parts.number)),
          dim3(kDenseThreads), 0, stream};
}

}  // namespace sk::cuda
