// Forward: one warp computes one block row of the output for 32 * kWidth points.
//
// All lanes work on the same stored block at a time: x is read in whole rows and the index needs no
// divergence. An element of x is loaded once for the kHeight rows of a block. The block's place is
// worked out by one lane per block, 32 at a time, and handed round by shuffle. The warps of a
// thread block are neighbouring block rows over the same points: what several of them read is in
// L1.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/values.cuh"

namespace sk::cuda {

// kHeight >= bh: sums of the rows above bh are not stored.
template <typename T, int kHeight, int kWidth, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, MinBlocks(kHeight* kWidth))
    ProductKernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ values,
                  const float* __restrict__ bias, const int32_t* __restrict__ crow,
                  const int32_t* __restrict__ col, int block_rows, int bh, int points, bool relu,
                  Source source) {
  const int block_row = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (block_row >= block_rows) return;
  const int lane = threadIdx.x;
  const int begin = crow[block_row], end = crow[block_row + 1];
  const BlockRow rows = FindBlockRow(block_row, source.RowsPerGroup(), bh);
  // The grid's second dimension is bounded, so a block may have several tiles to do.
  const int64_t step = static_cast<int64_t>(gridDim.y) * kWarp * kWidth;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kWarp * kWidth; tile < points;
       tile += step) {
    const int point = static_cast<int>(tile) + lane * kWidth;
    const bool mine = tile + lane * kWidth < points;
    const SourcePoint at = source.Point(mine ? point : 0);
    float sum[kHeight][kWidth] = {};
    for (int chunk = begin; chunk < end; chunk += kWarp) {
      const bool stored = chunk + lane < end;
      const SourceColumn found = source.Column(stored ? col[chunk + lane] : 0, rows.group);
      const int count = min(kWarp, end - chunk);
      for (int k = 0; k < count; ++k) {
        const int64_t offset = __shfl_sync(kAllLanes, found.offset, k);
        const int tap = Source::kImage ? __shfl_sync(kAllLanes, found.tap, k) : 0;
        if (!mine || !source.Inside(at, tap)) continue;
        float from[kWidth], value[kHeight];
        Load<kWidth>(from, x + (at.offset + offset));
        LoadValues(value, values + static_cast<int64_t>(chunk + k) * bh, rows.height);
#pragma unroll
        for (int v = 0; v < kHeight; ++v)
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum[v][i] += value[v] * from[i];
      }
    }
    if (!mine) continue;
#pragma unroll
    for (int v = 0; v < kHeight; ++v) {
      if (v >= rows.height) break;
      const int row = rows.first + v;
      FinishRow<kWidth>(y + static_cast<int64_t>(row) * points + point, sum[v], bias, row, relu);
    }
  }
}

// What the launchers hand down: sizes checked, what() renders kernel and shape.
struct ProductShape {
  int block_rows, points;
  int width;  // points per lane that batch and addresses allow: 4 or 1
};

template <typename T, int kHeight, int kWidth, typename Source>
void LaunchProduct(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  Launch(what, ProductKernel<T, kHeight, kWidth, Source>,
         {Grid(s.block_rows, kWarpsPerBlock, s.points, kWarp * kWidth), dim3(kWarp, kWarpsPerBlock),
          0, a.place.stream},
         static_cast<T*>(a.y), static_cast<const T*>(a.x), a.values, a.bias, a.crow, a.col,
         s.block_rows, static_cast<int>(a.bh), s.points, a.relu, Source(a.geometry));
}

template <typename T, int kHeight, typename Source>
void ProductOfHeight(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  constexpr int kWide = kHeight >= 32 ? 2 : 4;  // 64 sums at most
  // A narrow batch is better spread over all lanes than packed into a few.
  if (s.width >= kWide && s.points > kWarp * kWide / 2)
    return LaunchProduct<T, kHeight, kWide, Source>(what, a, s);
  LaunchProduct<T, kHeight, 1, Source>(what, a, s);
}

template <typename T, typename Source>
void ProductOf(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  if (a.bh == 1) return ProductOfHeight<T, 1, Source>(what, a, s);
  if (a.bh == 2) return ProductOfHeight<T, 2, Source>(what, a, s);
  if (a.bh <= 4) return ProductOfHeight<T, 4, Source>(what, a, s);
  if (a.bh <= 8) return ProductOfHeight<T, 8, Source>(what, a, s);
  if (a.bh <= 16) return ProductOfHeight<T, 16, Source>(what, a, s);
  return ProductOfHeight<T, 32, Source>(what, a, s);
}

}  // namespace sk::cuda
