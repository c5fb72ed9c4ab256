// dgrad: one warp computes one input channel for 32 * kWidth points.
//
// The transposed index lists, for a column of the weight (a tap and a channel), the blocks that
// hold it. Where a lane's points are in grad depends on the tap only, so it is worked out once per
// tap, division by the stride included.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"

namespace sk::cuda {

// First entry of t_row[begin, end), which is sorted, that is at least `block_row`.
__device__ __forceinline__ int LowerBound(const int32_t* t_row, int begin, int end, int block_row) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (t_row[middle] < block_row)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <typename T, int kWidth, typename Target>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, MinBlocks(kWidth))
    DgradKernel(T* __restrict__ dx, const T* __restrict__ grad, const float* __restrict__ values,
                const int32_t* __restrict__ t_crow, const int32_t* __restrict__ t_row,
                const int32_t* __restrict__ t_perm, int in_channels, int rows_per_group, int bh,
                int in_points, int out_points, Target target) {
  const int channel = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (channel >= in_channels) return;
  const int channels = target.Channels(), group = channel / channels;
  const int per_group = (rows_per_group + bh - 1) / bh;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kWarp * kWidth;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kWarp * kWidth; tile < in_points;
       tile += step) {
    const bool mine = tile + threadIdx.x * kWidth < in_points;
    const int point = mine ? static_cast<int>(tile) + static_cast<int>(threadIdx.x) * kWidth : 0;
    float sum[kWidth] = {};
    for (int tap = 0; tap < target.Taps(); ++tap) {
      const int column = tap * channels + channel % channels;
      int begin = t_crow[column], end = t_crow[column + 1];
      if (channels != in_channels) {  // the column is one of every group
        begin = LowerBound(t_row, begin, end, group * per_group);
        end = LowerBound(t_row, begin, end, (group + 1) * per_group);
      }
      int64_t offset = 0;
      if (!mine || !target.Find(point, tap, &offset)) continue;
      for (int k = begin; k < end; ++k) {
        const BlockRow rows = FindBlockRow(__ldg(t_row + k), rows_per_group, bh);
        const float* value = values + static_cast<int64_t>(__ldg(t_perm + k)) * bh;
        const T* from = grad + (static_cast<int64_t>(rows.first) * out_points + offset);
#pragma unroll 4
        for (int v = 0; v < rows.height; ++v) {
          float g[kWidth];
          Load<kWidth>(g, from + static_cast<int64_t>(v) * out_points);
          const float w = __ldg(value + v);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum[i] += w * g[i];
        }
      }
    }
    if (mine) Store<kWidth>(dx + (static_cast<int64_t>(channel) * in_points + point), sum);
  }
}

struct DgradShape {
  int in_channels, rows_per_group, in_points, out_points, width;
};

template <typename T, int kWidth, typename Target>
void LaunchDgrad(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  Launch(what, DgradKernel<T, kWidth, Target>,
         {Grid(s.in_channels, kWarpsPerBlock, s.in_points, kWarp * kWidth),
          dim3(kWarp, kWarpsPerBlock), 0, a.place.stream},
         static_cast<T*>(a.dx), static_cast<const T*>(a.grad), a.values, a.t_crow, a.t_row,
         a.t_perm, s.in_channels, s.rows_per_group, static_cast<int>(a.bh), s.in_points,
         s.out_points, Target(a.geometry));
}

template <typename T, typename Target>
void DgradOf(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  if (s.width >= 4 && s.in_points > kWarp * 2) return LaunchDgrad<T, 4, Target>(what, a, s);
  LaunchDgrad<T, 1, Target>(what, a, s);
}

}  // namespace sk::cuda
