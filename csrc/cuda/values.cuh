// What the forward kernels share: the values of a block, and how a row is finished.
#pragma once

#include "cuda/pack.cuh"

namespace sk::cuda {

// The values of one block; past `height` zeros, so that the sums of rows that are not there stay 0.
template <int kHeight>
__device__ __forceinline__ void LoadValues(float (&to)[kHeight], const float* from, int height) {
#pragma unroll
  for (int v = 0; v < kHeight; ++v) to[v] = v < height ? __ldg(from + v) : 0.0f;
}

// Bias and ReLU, then the store.
template <int kWidth, typename T>
__device__ __forceinline__ void FinishRow(T* to, float (&sum)[kWidth], const float* bias, int row,
                                          bool relu) {
  const float add = bias != nullptr ? __ldg(bias + row) : 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    sum[i] += add;
    if (relu && sum[i] < 0.0f) sum[i] = 0.0f;  // not fmaxf, which would swallow NaN
  }
  Store<kWidth>(to, sum);
}

}  // namespace sk::cuda
