// Forward: one warp computes one block row of the output for 32 x 4 points.
//
// All lanes work on the same stored block at a time: x is read in whole rows and the index needs no
// divergence. An element of x is loaded once for the kHeight rows of a block. Entries are read four
// at a time; a convolution's places are worked out by one lane per block, 32 at a time, and handed
// round by shuffle. The warps of a thread block are block rows of like length (or neighbours)
// over the same points: what several of them read is in L1.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/values.cuh"
#include "cuda/walk.cuh"

namespace sk::cuda {

// The points of one lane and the sums of its block row there.
template <int kHeight, typename L, typename Source>
struct ProductSums {
  SourcePoint at[L::kSteps];
  bool mine[L::kSteps];
  float sum[kHeight][L::kSteps][L::kPack];

  __device__ __forceinline__ void Begin(const Source& source, int64_t tile, int points) {
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      const int64_t point = L::Point(tile, s);
      mine[s] = point < points;
      at[s] = source.Point(mine[s] ? static_cast<int>(point) : 0);
#pragma unroll
      for (int v = 0; v < kHeight; ++v)
#pragma unroll
        for (int i = 0; i < L::kPack; ++i) sum[v][s][i] = 0.0f;
    }
  }

  // Adds one block whose column lies at x + offset (and is out of the image for some taps). It has
  // `height` values, and 16-byte aligned ones in packs of four where `whole`.
  template <typename T>
  __device__ __forceinline__ void Add(const Source& source, const T* x, const SourceColumn& column,
                                      const float* values, int height, bool whole) {
    constexpr int kFour = kHeight < 4 ? kHeight : kHeight <= 8 ? 4 : 1;
    float from[L::kSteps][L::kPack];
    bool inside[L::kSteps];
    if (!LoadPoints(from, inside, source, x, column)) return;
#pragma unroll
    for (int v = 0; v < kHeight; v += kFour) {
      float value[kFour];  // a few at a time: registers
      LoadValues(value, values, v, height, whole);
#pragma unroll
      for (int i = 0; i < kFour; ++i) AddRow(sum[v + i], value[i], from, inside);
    }
  }

  // Adds one element of the weight.
  template <typename T>
  __device__ __forceinline__ void AddElement(const Source& source, const T* x,
                                             const SourceColumn& column, float value) {
    float from[L::kSteps][L::kPack];
    bool inside[L::kSteps];
    if (LoadPoints(from, inside, source, x, column)) AddRow(sum[0], value, from, inside);
  }

 private:
  // False where none of the lane's points is inside.
  template <typename T>
  __device__ __forceinline__ bool LoadPoints(float (&from)[L::kSteps][L::kPack],
                                             bool (&inside)[L::kSteps], const Source& source,
                                             const T* x, const SourceColumn& column) {
    bool any = false;
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      inside[s] = mine[s] && source.Inside(at[s], column.tap);
      any |= inside[s];
      if (inside[s]) Load<L::kPack>(from[s], x + (at[s].offset + column.offset));
    }
    return any;
  }

  __device__ __forceinline__ static void AddRow(float (&to)[L::kSteps][L::kPack], float value,
                                                const float (&from)[L::kSteps][L::kPack],
                                                const bool (&inside)[L::kSteps]) {
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      if (!inside[s]) continue;  // an infinite value must not meet padding
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) to[s][i] += value * from[s][i];
    }
  }
};

// Registers beside the sums: for the places of several steps of an image, and where there are 8
// sums, for which ptxas spills on sm_100.
template <typename L, typename Source>
constexpr int ProductBlocks(int height) {
  const int sums = height * L::kPack * L::kSteps;
  const bool places = L::kSteps > 1 && Source::kImage && sums <= 8;
  const bool full = sums == 8 && (L::kSteps > 1 || (L::kPack == 1 && Source::kImage));
  return MinBlocks(places || full ? 9 : sums);
}

// kHeight >= bh: sums of the rows above bh are not stored. wide_index: values and col are 16-byte
// aligned.
template <typename T, int kHeight, typename L, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, (ProductBlocks<L, Source>(kHeight)))
    ProductKernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ values,
                  const float* __restrict__ bias, const int32_t* __restrict__ crow,
                  const int32_t* __restrict__ col, const int32_t* __restrict__ order,
                  int block_rows, int bh, int points, bool relu, bool wide_index, Source source) {
  constexpr int kEntries = kHeight <= 2 ? 4 : 1;  // read together: as far as the registers go
  const int slot = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (slot >= block_rows) return;
  const int block_row = RowAt(order, slot), lane = threadIdx.x;
  const int begin = crow[block_row], end = crow[block_row + 1], stored = crow[block_rows];
  const BlockRow rows = FindBlockRow(block_row, source.RowsPerGroup(), bh);
  const bool whole_block = kHeight <= 8 && wide_index && bh == kHeight;
  // The grid's second dimension is bounded, so a block may have several tiles to do.
  const int64_t step = static_cast<int64_t>(gridDim.y) * L::kTile;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * L::kTile; tile < points; tile += step) {
    ProductSums<kHeight, L, Source> sums;
    sums.Begin(source, tile, points);
    for (int chunk = begin & -kEntries; chunk < end; chunk += kWarp) {
      SourceColumn found = {0, 0};
      if constexpr (Source::kImage) {
        const bool in_row = chunk + lane >= begin && chunk + lane < end;
        found = source.Column(in_row ? col[chunk + lane] : 0, rows.group);
      }
      const int last = min(end, chunk + kWarp);
#pragma unroll 1
      for (int group = chunk; group < last; group += kEntries) {
        const bool whole = wide_index && group + kEntries <= stored;
        int column[kEntries];
        float element[kEntries];
        if constexpr (!Source::kImage) LoadEntries(column, col, group, begin, end, whole);
        if constexpr (kHeight == 1) LoadEntries(element, values, group, begin, end, whole);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
          const int k = group + i;
          if (k < begin || k >= end) continue;
          SourceColumn place = {0, 0};
          if constexpr (Source::kImage) {
            place.offset = __shfl_sync(kAllLanes, found.offset, k - chunk);
            place.tap = __shfl_sync(kAllLanes, found.tap, k - chunk);
          } else {
            place = source.Column(column[i], rows.group);
          }
          if constexpr (kHeight == 1)
            sums.AddElement(source, x, place, element[i]);
          else
            sums.Add(source, x, place, values + static_cast<int64_t>(k) * bh, rows.height,
                     whole_block);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      if (!sums.mine[s]) continue;
      const int point = static_cast<int>(L::Point(tile, s));  // 32 bits: ptxas spilled addresses
#pragma unroll
      for (int v = 0; v < kHeight; ++v) {
        if (v >= rows.height) break;
        const int row = rows.first + v;
        FinishRow<L::kPack>(y + static_cast<int64_t>(row) * points + point, sums.sum[v][s], bias,
                            row, relu);
      }
    }
  }
}

template <typename T, int kHeight, typename L, typename Source>
void LaunchProduct(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  Launch(what, ProductKernel<T, kHeight, L, Source>,
         {Grid(s.block_rows, kWarpsPerBlock, s.points, L::kTile), dim3(kWarp, kWarpsPerBlock), 0,
          a.place.stream},
         static_cast<T*>(a.y), static_cast<const T*>(a.x), a.values, a.bias, a.crow, a.col, a.order,
         s.block_rows, static_cast<int>(a.bh), s.points, a.relu, s.wide_index, Source(a.geometry));
}

template <typename T, int kHeight, typename Source>
void ProductOfHeight(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  constexpr int kWide = kHeight >= 32 ? 2 : 4;  // 64 sums at most
  // A narrow batch is better spread over all lanes than packed into a few.
  if (s.points <= kWarp * kWide / 2)
    return LaunchProduct<T, kHeight, Lanes<1, 1>, Source>(what, a, s);
  if (s.width >= kWide) return LaunchProduct<T, kHeight, Lanes<kWide, 1>, Source>(what, a, s);
  LaunchProduct<T, kHeight, Lanes<1, kWide>, Source>(what, a, s);
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
