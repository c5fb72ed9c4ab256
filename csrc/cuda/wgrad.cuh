// wgrad: one warp computes kBlocks stored blocks, which are neighbours in the index, over one part
// of the points; a second kernel adds the parts up in order.
//
// Neighbours mostly share a block row, so each element of grad is loaded once for all of them, and
// each of x once for the block's rows. The sums of the 32 lanes are then added in pairs, half of
// them kept by either lane: 31 shuffles for 32 sums instead of 160.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"

namespace sk::cuda {

// sums[i] of all lanes added up. The result for i ends in the lanes whose number / (32 / kCount) is
// i; the first of them is the one to store it.
template <int kCount, int kBit = kWarp / 2>
__device__ __forceinline__ float ReduceLanes(float* sums, int lane) {
  if constexpr (kBit == 0) {
    return sums[0];
  } else if constexpr (kCount > 1) {
    const bool upper = (lane & kBit) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float keep = upper ? sums[i + kCount / 2] : sums[i];
      const float give = upper ? sums[i] : sums[i + kCount / 2];
      sums[i] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
    }
    return ReduceLanes<kCount / 2, kBit / 2>(sums, lane);
  } else {
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);
    return ReduceLanes<1, kBit / 2>(sums, lane);
  }
}

// Block row that stores entry k: the last one that begins at or before it and is not empty.
__device__ __forceinline__ int RowOfEntry(const int32_t* crow, int block_rows, int k) {
  int low = 0, high = block_rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (crow[middle] <= k)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <typename T, int kHeight, int kBlocks, int kWidth, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock,
                                  Source::kImage && kBlocks * kWidth >= 32 ? 1 : 2)
    WgradKernel(float* __restrict__ out, const T* __restrict__ grad, const T* __restrict__ x,
                const int32_t* __restrict__ crow, const int32_t* __restrict__ col, int block_rows,
                int capacity, int bh, int points, int part, Source source) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kBlocks;
  if (first >= capacity) return;
  const int lane = threadIdx.x, stored = crow[block_rows];
  const int last = min(static_cast<int>(first) + kBlocks, capacity);
  // Not min(points, from + part): near 2^31 points that sum wraps.
  const int from = static_cast<int>(blockIdx.y) * part, to = from + min(points - from, part);
  float* to_values = out + static_cast<int64_t>(blockIdx.y) * capacity * bh;
  int k = static_cast<int>(first);
  while (k < min(last, stored)) {
    const int block_row = RowOfEntry(crow, block_rows, k);
    const int count = min(min(last, stored), crow[block_row + 1]) - k;
    const BlockRow rows = FindBlockRow(block_row, source.RowsPerGroup(), bh);
    SourceColumn column[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
      column[j] = source.Column(j < count ? col[k + j] : 0, rows.group);
    float sums[kBlocks * kHeight] = {};
    for (int point = from + lane * kWidth; point < to; point += kWarp * kWidth) {
      const SourcePoint at = source.Point(point);
      float xs[kBlocks][kWidth] = {};
      bool inside[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        inside[j] = j < count && source.Inside(at, column[j].tap);
        if (inside[j]) Load<kWidth>(xs[j], x + (at.offset + column[j].offset));
      }
#pragma unroll
      for (int v = 0; v < kHeight; ++v) {
        if (v >= rows.height) break;
        float g[kWidth];
        Load<kWidth>(g, grad + (static_cast<int64_t>(rows.first + v) * points + point));
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          if (Source::kImage && !inside[j]) continue;  // an infinite g times padding would be NaN
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sums[j * kHeight + v] += g[i] * xs[j][i];
        }
      }
    }
    const float sum = ReduceLanes<kBlocks * kHeight>(sums, lane);
    constexpr int kLanes = kWarp / (kBlocks * kHeight);
    const int j = lane / kLanes / kHeight, v = lane / kLanes % kHeight;
    if (lane % kLanes == 0 && j < count && v < bh)
      to_values[static_cast<int64_t>(k + j) * bh + v] = sum;  // 0 below a partial block's rows
    k += count;
  }
  for (int64_t i = static_cast<int64_t>(k) * bh + lane; i < static_cast<int64_t>(last) * bh;
       i += kWarp)
    to_values[i] = 0.0f;
}

// dvalues[i] = the parts' sums, in order.
inline __global__ void __launch_bounds__(256)
    AddPartsKernel(float* __restrict__ dvalues, const float* __restrict__ parts, int64_t count,
                   int part_count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int p = 0; p < part_count; ++p) sum += parts[p * count + i];
  dvalues[i] = sum;
}

// Stored blocks of one warp.
constexpr int WgradBlocks(int64_t bh) { return bh <= 4 ? 8 : bh <= 8 ? 4 : bh <= 16 ? 2 : 1; }

struct WgradShape {
  int block_rows, capacity, points, width;
  int part;   // points of one part, a multiple of 4
  int parts;  // 1: straight into dvalues
  bool wide;  // rows of grad and x can be copied 16 bytes at a time
};

inline void AddParts(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  if (s.parts == 1) return;
  const int64_t count = int64_t(s.capacity) * a.bh;
  Launch(what, AddPartsKernel,
         {dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, a.place.stream},
         a.dvalues, static_cast<const float*>(a.workspace), count, s.parts);
}

template <typename T, int kHeight, int kBlocks, int kWidth, typename Source>
void LaunchWgrad(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  const int64_t warps = (int64_t(s.capacity) + kBlocks - 1) / kBlocks;
  const unsigned blocks = static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
  float* out = s.parts == 1 ? a.dvalues : static_cast<float*>(a.workspace);
  Launch(what, WgradKernel<T, kHeight, kBlocks, kWidth, Source>,
         {dim3(blocks, static_cast<unsigned>(s.parts)), dim3(kWarp, kWarpsPerBlock), 0,
          a.place.stream},
         out, static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.crow, a.col,
         s.block_rows, s.capacity, static_cast<int>(a.bh), s.points, s.part, Source(a.geometry));
  AddParts(what, a, s);
}

template <typename T, int kHeight, int kBlocks, typename Source>
void WgradOfHeight(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  if (s.width >= 4 && s.points > kWarp * 2)
    return LaunchWgrad<T, kHeight, kBlocks, 4, Source>(what, a, s);
  LaunchWgrad<T, kHeight, kBlocks, 1, Source>(what, a, s);
}

template <typename T, typename Source>
void WgradOf(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  if (a.bh == 1) return WgradOfHeight<T, 1, WgradBlocks(1), Source>(what, a, s);
  if (a.bh == 2) return WgradOfHeight<T, 2, WgradBlocks(2), Source>(what, a, s);
  if (a.bh <= 4) return WgradOfHeight<T, 4, WgradBlocks(4), Source>(what, a, s);
  if (a.bh <= 8) return WgradOfHeight<T, 8, WgradBlocks(8), Source>(what, a, s);
  if (a.bh <= 16) return WgradOfHeight<T, 16, WgradBlocks(16), Source>(what, a, s);
  return WgradOfHeight<T, 32, WgradBlocks(32), Source>(what, a, s);
}

}  // namespace sk::cuda
