// Small batches: at most 16 points per channel (batch times output pixels, see geometry.cuh), where
// a warp that spreads over points would leave half of its lanes idle, 31 of 32 for a single sample.
// Here the lanes spread over stored entries as well: with P points, rounded up to a power of two,
// lane i works on point i % P of every (32 / P)-th entry, and the lanes of a point add up at the
// end, in pairs.
#pragma once

#include "cuda/dgrad.cuh"
#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/values.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

constexpr int kSmallPoints = kWarp / 2;

// Adds up sums[] over the lanes that differ in bits kBit, kBit / 2 ... `stop` of their number, and
// calls done(i, sum) for what this lane ends with. As long as it has several sums a lane gives half
// of them away and keeps the other half, so that 32 sums take 31 shuffles and not 160.
template <int kCount, int kBit = kWarp / 2, typename Done>
__device__ __forceinline__ void SpreadSums(float* sums, int lane, int stop, int first, Done done) {
  if constexpr (kBit > 0) {
    if (kBit >= stop) {
      if constexpr (kCount > 1) {
        const bool upper = (lane & kBit) != 0;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          const float keep = upper ? sums[i + kCount / 2] : sums[i];
          const float give = upper ? sums[i] : sums[i + kCount / 2];
          sums[i] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
        }
        first += upper ? kCount / 2 : 0;
        return SpreadSums<kCount / 2, kBit / 2>(sums, lane, stop, first, done);
      } else {
        sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);
        return SpreadSums<1, kBit / 2>(sums, lane, stop, first, done);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) done(first + i, sums[i]);
}

// Forward: one warp computes one block row. Several lanes may end with the same sum, and store it.
template <typename T, int kHeight, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, MinBlocks(kHeight))
    SmallProductKernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ values,
                       const float* __restrict__ bias, const int32_t* __restrict__ crow,
                       const int32_t* __restrict__ col, int block_rows, int bh, int points,
                       int lanes_per_entry, bool relu, Source source) {
  const int block_row = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (block_row >= block_rows) return;
  const int lane = threadIdx.x, point = lane & (lanes_per_entry - 1);
  const bool mine = point < points;
  const int end = crow[block_row + 1], step = kWarp / lanes_per_entry;
  const BlockRow rows = FindBlockRow(block_row, source.RowsPerGroup(), bh);
  const SourcePoint at = source.Point(mine ? point : 0);
  float sums[kHeight] = {};
  for (int k = crow[block_row] + lane / lanes_per_entry; k < end; k += step) {
    const SourceColumn column = source.Column(__ldg(col + k), rows.group);
    if (!mine || !source.Inside(at, column.tap)) continue;
    float from[1], value[kHeight];
    Load<1>(from, x + (at.offset + column.offset));
    LoadValues(value, values + static_cast<int64_t>(k) * bh, rows.height);
#pragma unroll
    for (int v = 0; v < kHeight; ++v) sums[v] += value[v] * from[0];
  }
  SpreadSums<kHeight>(sums, lane, lanes_per_entry, 0, [&](int v, float sum) {
    if (!mine || v >= rows.height) return;
    const int row = rows.first + v;
    float out[1] = {sum};
    FinishRow<1>(y + static_cast<int64_t>(row) * points + point, out, bias, row, relu);
  });
}

// dgrad: one warp computes one input channel; its lanes spread over the single values of the
// column's blocks.
template <typename T, typename Target>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 4)
    SmallDgradKernel(T* __restrict__ dx, const T* __restrict__ grad,
                     const float* __restrict__ values, const int32_t* __restrict__ t_crow,
                     const int32_t* __restrict__ t_row, const int32_t* __restrict__ t_perm,
                     int in_channels, int rows_per_group, int bh, int in_points, int out_points,
                     int lanes_per_entry, Target target) {
  const int channel = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (channel >= in_channels) return;
  const int channels = target.Channels(), group = channel / channels;
  const int per_group = (rows_per_group + bh - 1) / bh;
  const int lane = threadIdx.x, point = lane & (lanes_per_entry - 1);
  const bool mine = point < in_points;
  float sum[1] = {};
  for (int tap = 0; tap < target.Taps(); ++tap) {
    const int column = tap * channels + channel % channels;
    int begin = t_crow[column], end = t_crow[column + 1];
    if (channels != in_channels) {  // the column is one of every group
      begin = LowerBound(t_row, begin, end, group * per_group);
      end = LowerBound(t_row, begin, end, (group + 1) * per_group);
    }
    int64_t offset = 0;
    if (!mine || !target.Find(point, tap, &offset)) continue;
    const int count = (end - begin) * bh;  // at most the rows and a partial block
    for (int i = lane / lanes_per_entry; i < count; i += kWarp / lanes_per_entry) {
      const int k = begin + i / bh, v = i % bh;
      const BlockRow rows = FindBlockRow(__ldg(t_row + k), rows_per_group, bh);
      if (v >= rows.height) continue;
      float g[1];
      Load<1>(g, grad + (static_cast<int64_t>(rows.first + v) * out_points + offset));
      sum[0] += __ldg(values + (static_cast<int64_t>(__ldg(t_perm + k)) * bh + v)) * g[0];
    }
  }
  SpreadSums<1>(sum, lane, lanes_per_entry, 0, [&](int, float total) {
    const float out[1] = {total};
    if (mine) Store<1>(dx + (static_cast<int64_t>(channel) * in_points + point), out);
  });
}

// wgrad: one thread computes one value.
template <typename T, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 4)
    SmallWgradKernel(float* __restrict__ dvalues, const T* __restrict__ grad,
                     const T* __restrict__ x, const int32_t* __restrict__ crow,
                     const int32_t* __restrict__ col, int block_rows, int64_t count, int bh,
                     int points, Source source) {
  const int64_t i =
      (static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kWarp + threadIdx.x;
  if (i >= count) return;
  const int k = static_cast<int>(i / bh), v = static_cast<int>(i % bh);
  float sum = 0.0f;
  if (k < crow[block_rows]) {  // past it, and below a partial block's rows: 0
    const int block_row = RowOfEntry(crow, block_rows, k);
    const BlockRow rows = FindBlockRow(block_row, source.RowsPerGroup(), bh);
    if (v < rows.height) {
      const SourceColumn column = source.Column(__ldg(col + k), rows.group);
      const T* from = grad + static_cast<int64_t>(rows.first + v) * points;
      for (int point = 0; point < points; ++point) {
        const SourcePoint at = source.Point(point);
        if (!source.Inside(at, column.tap)) continue;
        float a[1], b[1];
        Load<1>(a, x + (at.offset + column.offset));
        Load<1>(b, from + point);
        sum += a[0] * b[0];
      }
    }
  }
  dvalues[i] = sum;
}

inline int LanesPerEntry(int points) {
  int lanes = 1;
  while (lanes < points) lanes *= 2;
  return lanes;
}
inline unsigned WarpBlocks(int64_t warps) {
  return static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

template <typename T, int kHeight, typename Source>
void LaunchSmallProduct(const CallName& what, const ProductArgs& a, int block_rows, int points) {
  Launch(what, SmallProductKernel<T, kHeight, Source>,
         {dim3(WarpBlocks(block_rows)), dim3(kWarp, kWarpsPerBlock), 0, a.place.stream},
         static_cast<T*>(a.y), static_cast<const T*>(a.x), a.values, a.bias, a.crow, a.col,
         block_rows, static_cast<int>(a.bh), points, LanesPerEntry(points), a.relu,
         Source(a.geometry));
}

template <typename T, typename Source>
void SmallProductOf(const CallName& what, const ProductArgs& a, int block_rows, int points) {
  if (a.bh == 1) return LaunchSmallProduct<T, 1, Source>(what, a, block_rows, points);
  if (a.bh == 2) return LaunchSmallProduct<T, 2, Source>(what, a, block_rows, points);
  if (a.bh <= 4) return LaunchSmallProduct<T, 4, Source>(what, a, block_rows, points);
  if (a.bh <= 8) return LaunchSmallProduct<T, 8, Source>(what, a, block_rows, points);
  if (a.bh <= 16) return LaunchSmallProduct<T, 16, Source>(what, a, block_rows, points);
  LaunchSmallProduct<T, 32, Source>(what, a, block_rows, points);
}

template <typename T, typename Target>
void SmallDgradOf(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  Launch(what, SmallDgradKernel<T, Target>,
         {dim3(WarpBlocks(s.in_channels)), dim3(kWarp, kWarpsPerBlock), 0, a.place.stream},
         static_cast<T*>(a.dx), static_cast<const T*>(a.grad), a.values, a.t_crow, a.t_row,
         a.t_perm, s.in_channels, s.rows_per_group, static_cast<int>(a.bh), s.in_points,
         s.out_points, LanesPerEntry(s.in_points), Target(a.geometry));
}

template <typename T, typename Source>
void SmallWgradOf(const CallName& what, const WgradArgs& a, int block_rows, int points) {
  const int64_t count = a.capacity * a.bh;
  Launch(what, SmallWgradKernel<T, Source>,
         {dim3(WarpBlocks((count + kWarp - 1) / kWarp)), dim3(kWarp, kWarpsPerBlock), 0,
          a.place.stream},
         a.dvalues, static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.crow, a.col,
         block_rows, count, static_cast<int>(a.bh), points, Source(a.geometry));
}

}  // namespace sk::cuda
