// dgrad: one warp computes one input channel for 32 x 4 points.
//
// The transposed index lists, for a column of the weight (a tap and a channel), the blocks that
// hold it. Where a lane's points are in grad depends on the tap only, so it is worked out once per
// tap, division by the stride included.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/walk.cuh"

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

// Blocks in several steps unroll their rows, for which ptxas spills on sm_100 at 64 registers.
template <typename L, bool kElements>
constexpr int DgradBlocks() {
  return MinBlocks(!kElements && L::kSteps > 1 ? 9 : L::kPack * L::kSteps);
}

// kElements: bh is 1. wide_index: t_row and t_perm are 16-byte aligned.
template <typename T, bool kElements, typename L, typename Target>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, (DgradBlocks<L, kElements>()))
    DgradKernel(T* __restrict__ dx, const T* __restrict__ grad, const float* __restrict__ values,
                const int32_t* __restrict__ t_crow, const int32_t* __restrict__ t_row,
                const int32_t* __restrict__ t_perm, const int32_t* __restrict__ order,
                int in_channels, int rows_per_group, int bh, int in_points, int out_points,
                bool wide_index, Target target) {
  constexpr int kEntries = kElements ? 4 : 1;  // read together
  const int slot = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (slot >= in_channels) return;
  const int channel = RowAt(order, slot);
  const int channels = target.Channels(), group = channel / channels;
  const int per_group = (rows_per_group + bh - 1) / bh;
  const int stored = t_crow[target.Taps() * channels];
  const int64_t step = static_cast<int64_t>(gridDim.y) * L::kTile;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * L::kTile; tile < in_points; tile += step) {
    float sum[L::kSteps][L::kPack] = {};
    for (int tap = 0; tap < target.Taps(); ++tap) {
      const int column = tap * channels + channel % channels;
      int begin = t_crow[column], end = t_crow[column + 1];
      if (channels != in_channels) {  // the column is one of every group
        begin = LowerBound(t_row, begin, end, group * per_group);
        end = LowerBound(t_row, begin, end, (group + 1) * per_group);
      }
      int64_t offset[L::kSteps];
      bool inside[L::kSteps], any = false;
#pragma unroll
      for (int s = 0; s < L::kSteps; ++s) {
        const int64_t point = L::Point(tile, s);
        offset[s] = 0;
        inside[s] = point < in_points && target.Find(static_cast<int>(point), tap, &offset[s]);
        any |= inside[s];
      }
      if (!any) continue;
      for (int four = begin & -kEntries; four < end; four += kEntries) {
        const bool whole = wide_index && four + kEntries <= stored;
        int block_row[kEntries], place[kEntries];
        LoadEntries(block_row, t_row, four, begin, end, whole);
        LoadEntries(place, t_perm, four, begin, end, whole);
#pragma unroll
        for (int k = 0; k < kEntries; ++k) {
          if (four + k < begin || four + k >= end) continue;
          const int local = (block_row[k] - group * per_group) * bh;
          const int height = kElements ? 1 : min(bh, rows_per_group - local);
          const float* value = values + static_cast<int64_t>(place[k]) * bh;
          const T* from = grad + static_cast<int64_t>(group * rows_per_group + local) * out_points;
#pragma unroll(kElements ? 1 : 4)
          for (int v = 0; v < height; ++v) {
            const float w = __ldg(value + v);
            const T* row = from + static_cast<int64_t>(v) * out_points;
#pragma unroll
            for (int s = 0; s < L::kSteps; ++s) {
              if (!inside[s]) continue;
              float g[L::kPack];
              Load<L::kPack>(g, row + offset[s]);
#pragma unroll
              for (int i = 0; i < L::kPack; ++i) sum[s][i] += w * g[i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      const int64_t point = L::Point(tile, s);
      if (point < in_points)
        Store<L::kPack>(dx + (static_cast<int64_t>(channel) * in_points + point), sum[s]);
    }
  }
}

struct DgradShape {
  int in_channels, rows_per_group, in_points, out_points, width;
  bool wide_index;  // t_row and t_perm are 16-byte aligned
};

template <typename T, bool kElements, typename L, typename Target>
void LaunchDgrad(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  Launch(what, DgradKernel<T, kElements, L, Target>,
         {Grid(s.in_channels, kWarpsPerBlock, s.in_points, L::kTile), dim3(kWarp, kWarpsPerBlock),
          0, a.place.stream},
         static_cast<T*>(a.dx), static_cast<const T*>(a.grad), a.values, a.t_crow, a.t_row,
         a.t_perm, a.order, s.in_channels, s.rows_per_group, static_cast<int>(a.bh), s.in_points,
         s.out_points, s.wide_index, Target(a.geometry));
}

template <typename T, bool kElements, typename Target>
void DgradOfBlocks(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  if (s.in_points <= kWarp * 2) return LaunchDgrad<T, kElements, Lanes<1, 1>, Target>(what, a, s);
  if (s.width >= 4) return LaunchDgrad<T, kElements, Lanes<4, 1>, Target>(what, a, s);
  LaunchDgrad<T, kElements, Lanes<1, 4>, Target>(what, a, s);
}

template <typename T, typename Target>
void DgradOf(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  if (a.bh == 1) return DgradOfBlocks<T, true, Target>(what, a, s);
  DgradOfBlocks<T, false, Target>(what, a, s);
}

}  // namespace sk::cuda
