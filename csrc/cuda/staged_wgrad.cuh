// wgrad with both operands staged in shared memory: a thread block computes the stored blocks of 96
// rows (96 / kHeight block rows) in a chunk of 96 columns, over one part of the points. It streams
// these rows of grad and of x through shared memory, 64 points at a time, by cp.async, one tile
// under way while the other is multiplied. Its entries lie end to end, row by row, and are dealt to
// the warps in equal runs, 64 sums per lane.
//
// At density d each staged row of either side is used 96 d times: at 5 % 460 of 512 sums are busy,
// 2.4 products for each element that is read from global memory. WgradKernel has 0.9 of elements,
// 1.6 of 2 rows, 2.7 of 4 and 8, 1.8 of 16 and 1.0 of 32 rows: so this pays for elements, short and
// tall vectors above 2 %, not below. Rows in shared memory are aligned, so the vector loads there
// need no aligned residues: float32 of any batch is copied 4 bytes at a time where 16 do not fit.
//
// Serves layers of one group. Padding is multiplied as zeros: there an infinite gradient makes NaN,
// as in a dense convolution.
#pragma once

#include "cuda/dgrad.cuh"
#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

constexpr int kWgradLines = 96;  // of grad, and columns of x
constexpr int kWgradPoints = 64, kWgradStages = 2, kWgradSums = 64;
constexpr int kWgradWidth = kWgradPoints / kWarp;
constexpr int kWgradTile = 2 * kWgradLines * kWgradPoints;
constexpr int kWgradThreads = kWarp * kWarpsPerBlock;

// What a thread block finds out once: its columns, and where its entries of each block row begin in
// `col` and in the run of all of them. `entry` is that of each warp's slots: beside 64 sums,
// registers for it, and for where the block begins, made ptxas spill.
struct WgradRun {
  int first_row, first_column;  // block row and column
  SourceColumn column[kWgradLines];
  int begin[kWgradLines], count[kWgradLines], offset[kWgradLines + 1];
  int entry[kWarpsPerBlock][kWgradSums];
};

template <int kHeight, typename Source>
__device__ __forceinline__ int FindEntries(WgradRun& run, const int32_t* crow, const int32_t* col,
                                           int first_row, int block_rows, int first_column,
                                           int cols, const Source& source) {
  constexpr int kRows = kWgradLines / kHeight;
  const int thread = threadIdx.y * kWarp + threadIdx.x, row = first_row + thread;
  if (thread == 0) {
    run.first_row = first_row;
    run.first_column = first_column;
  }
  if (thread < kWgradLines)
    run.column[thread] = source.Column(min(first_column + thread, cols - 1), 0);
  if (thread < kRows) {
    const int from = row < block_rows ? crow[row] : 0, to = row < block_rows ? crow[row + 1] : 0;
    run.begin[thread] = LowerBound(col, from, to, first_column);
    run.count[thread] = LowerBound(col, from, to, first_column + kWgradLines) - run.begin[thread];
  }
  __syncthreads();
  if (thread <= kRows) {
    int sum = 0;
    for (int r = 0; r < thread; ++r) sum += run.count[r];
    run.offset[thread] = sum;
  }
  __syncthreads();
  return run.offset[kRows];
}

// Starts the copies of one tile: lines of grad, then columns of x, zeros outside of both.
template <int kBytes, typename T, int kHeight, typename Source>
__device__ __forceinline__ void FetchLines(T* tile, const T* grad, const T* x, const WgradRun& run,
                                           int cols, int bh, int points, int from, int to,
                                           const Source& source) {
  constexpr int kPack = kBytes / sizeof(T), kPacks = kWgradPoints / kPack;
  static_assert(kWgradThreads % kPacks == 0, "a thread keeps its points");
  const int thread = threadIdx.y * kWarp + threadIdx.x, within = thread % kPacks * kPack;
  const int point = from + within;
  const bool mine = point < to;
  const SourcePoint at = source.Point(mine ? point : 0);
  // Unrolled, its addresses would stay in registers beside the sums, and ptxas spills.
#pragma unroll 1
  for (int line = thread / kPacks; line < kWgradLines; line += kWgradThreads / kPacks) {
    const int v = line % kHeight, row = (run.first_row + line / kHeight) * bh + v;
    const bool there = mine && v < bh && row < source.RowsPerGroup();
    CopyAsync<kBytes>(tile + line * kWgradPoints + within,
                      grad + (there ? static_cast<int64_t>(row) * points + point : 0),
                      there ? kBytes : 0);
    const SourceColumn column = run.column[line];
    const bool inside = mine && run.first_column + line < cols && source.Inside(at, column.tap);
    CopyAsync<kBytes>(tile + (kWgradLines + line) * kWgradPoints + within,
                      x + (inside ? at.offset + column.offset : 0), inside ? kBytes : 0);
  }
}

// One tile's share of the sums. `place`: line of grad << 16 | column, of lane i's slots.
template <int kHeight, int kSlots, int kPlaces, typename T>
__device__ __forceinline__ void AddTile(float (&sums)[kWgradSums], const T* tile,
                                        const int (&place)[kPlaces]) {
  // Four rows of a block at a time: as long as the block row stays the same they are kept. (The
  // branch also keeps ptxas from loading for all slots first, into registers, until it spills.)
  constexpr int kKept = kHeight < 4 ? kHeight : 4;
  const T* lane = tile + threadIdx.x * kWgradWidth;
#pragma unroll
  for (int first = 0; first < kHeight; first += kKept) {
    float g[kKept][kWgradWidth];
    int line = -1;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int at = __shfl_sync(kAllLanes, place[j / kWarp], j % kWarp);
      float xs[kWgradWidth];
      LoadShared<kWgradWidth>(xs, lane + (kWgradLines + (at & 0xffff)) * kWgradPoints);
      if (line != at >> 16) {
        line = at >> 16;
#pragma unroll
        for (int v = 0; v < kKept; ++v)
          LoadShared<kWgradWidth>(g[v], lane + (line + first + v) * kWgradPoints);
      }
#pragma unroll
      for (int v = 0; v < kKept; ++v)
#pragma unroll
        for (int i = 0; i < kWgradWidth; ++i) sums[j * kHeight + first + v] += g[v][i] * xs[i];
    }
  }
}

template <typename T, int kHeight, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 2)
    StagedWgradKernel(float* __restrict__ out, const T* __restrict__ grad, const T* __restrict__ x,
                      const int32_t* __restrict__ crow, const int32_t* __restrict__ col,
                      int block_rows, int cols, int capacity, int bh, int points, int part,
                      bool wide, Source source) {
  constexpr int kRows = kWgradLines / kHeight, kSlots = kWgradSums / kHeight;
  constexpr int kPlaces = (kSlots + kWarp - 1) / kWarp;
  T* tiles = reinterpret_cast<T*>(DynamicShared());
  WgradRun& run = StaticShared<WgradRun>();
  const int lane = threadIdx.x, chunks = (cols + kWgradLines - 1) / kWgradLines;
  const int first_row = static_cast<int>(blockIdx.x) / chunks * kRows;
  const int first_column = static_cast<int>(blockIdx.x) % chunks * kWgradLines;
  const int from = static_cast<int>(blockIdx.y) * part, to = from + min(points - from, part);
  float* to_values = out + static_cast<int64_t>(blockIdx.y) * capacity * bh;
  if (blockIdx.x == 0) {  // past the stored blocks
    const int64_t end = static_cast<int64_t>(capacity) * bh;
    for (int64_t i = static_cast<int64_t>(crow[block_rows]) * bh + threadIdx.y * kWarp + lane;
         i < end; i += kWgradThreads)
      to_values[i] = 0.0f;
  }
  const int total =
      FindEntries<kHeight>(run, crow, col, first_row, block_rows, first_column, cols, source);
  const auto fetch = [&](int tile) {
    T* stage = tiles + tile % kWgradStages * kWgradTile;
    const int first = from + tile * kWgradPoints;
    if (wide)
      FetchLines<16, T, kHeight>(stage, grad, x, run, cols, bh, points, first, to, source);
    else
      FetchLines<4, T, kHeight>(stage, grad, x, run, cols, bh, points, first, to, source);
  };
  const int count = (to - from + kWgradPoints - 1) / kWgradPoints;
#pragma unroll 1
  for (int pass = 0; pass < total; pass += kWarpsPerBlock * kSlots) {
    int place[kPlaces];
    int* entry = run.entry[threadIdx.y];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int slot = i * kWarp + lane;
      const int at = pass + static_cast<int>(threadIdx.y) * kSlots + slot;
      const bool used = slot < kSlots && at < total;
      const int row = used ? RowOfEntry(run.offset, kRows, at) : 0;
      const int k = used ? run.begin[row] + at - run.offset[row] : -1;
      place[i] = used ? (row * kHeight) << 16 | (col[k] - run.first_column) : 0;
      if (slot < kSlots) entry[slot] = k;
    }
    __syncwarp();
    float sums[kWgradSums] = {};
    if (count > 0) fetch(0);
    CommitCopies();
#pragma unroll 1
    for (int tile = 0; tile < count; ++tile) {
      if (tile + 1 < count) fetch(tile + 1);
      CommitCopies();  // an empty group too, so that the count of groups is that of tiles
      WaitCopies<kWgradStages - 1>();
      __syncthreads();  // this tile is there for all
      AddTile<kHeight, kSlots>(sums, tiles + tile % kWgradStages * kWgradTile, place);
      __syncthreads();  // and all are done with it before it is overwritten
    }
#pragma unroll
    for (int half = 0; half < kWgradSums / kWarp; ++half) {
      const float sum = ReduceLanes<kWarp>(sums + half * kWarp, lane);
      const int slot = (half * kWarp + lane) / kHeight, v = (half * kWarp + lane) % kHeight;
      const int k = entry[slot];
      int line = 0;
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        const int there = __shfl_sync(kAllLanes, place[i], slot % kWarp);
        if (slot / kWarp == i) line = there >> 16;
      }
      const int row = (run.first_row + line / kHeight) * bh + v;
      if (k >= 0 && v < bh)  // 0 below a partial block's rows
        to_values[static_cast<int64_t>(k) * bh + v] = row < source.RowsPerGroup() ? sum : 0.0f;
    }
    __syncwarp();  // the next pass's entries go to the same places
  }
}

// Thread blocks of one part; 0 for a layer without rows or columns.
inline int64_t StagedWgradBlocks(const ConvGeometry& g, int64_t bh) {
  const int64_t height = bh <= 2 ? bh : bh <= 4 ? 4 : bh <= 8 ? 8 : bh <= 16 ? 16 : 32;
  const int64_t lines = (g.out_channels + bh - 1) / bh * height;
  const int64_t cols = g.kh * g.kw * g.in_channels;
  return ((lines + kWgradLines - 1) / kWgradLines) * ((cols + kWgradLines - 1) / kWgradLines);
}

template <typename T, int kHeight, typename Source>
void LaunchStagedWgrad(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  float* out = s.parts == 1 ? a.dvalues : static_cast<float*>(a.workspace);
  const ConvGeometry& g = a.geometry;
  const dim3 grid(static_cast<unsigned>(StagedWgradBlocks(g, a.bh)),
                  static_cast<unsigned>(s.parts));
  Launch(what, StagedWgradKernel<T, kHeight, Source>,
         {grid, dim3(kWarp, kWarpsPerBlock), sizeof(T) * kWgradStages * kWgradTile, a.place.stream},
         out, static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.crow, a.col,
         s.block_rows, static_cast<int>(g.kh * g.kw * g.in_channels), s.capacity,
         static_cast<int>(a.bh), s.points, s.part, s.wide, Source(g));
  AddParts(what, a, s);
}

template <typename T, typename Source>
void StagedWgradOf(const CallName& what, const WgradArgs& a, const WgradShape& s) {
  if (a.bh == 1) return LaunchStagedWgrad<T, 1, Source>(what, a, s);
  if (a.bh == 2) return LaunchStagedWgrad<T, 2, Source>(what, a, s);
  if (a.bh <= 4) return LaunchStagedWgrad<T, 4, Source>(what, a, s);
  if (a.bh <= 8) return LaunchStagedWgrad<T, 8, Source>(what, a, s);
  if (a.bh <= 16) return LaunchStagedWgrad<T, 16, Source>(what, a, s);
  LaunchStagedWgrad<T, 32, Source>(what, a, s);
}

}  // namespace sk::cuda
