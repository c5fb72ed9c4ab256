// Forward with x staged in shared memory: a thread block computes 128 / kHeight block rows for 64
// points, and streams the columns of x (for a convolution: a tap and a channel, shifted by the tap,
// zeros outside of the image) through shared memory in chunks of 128, by cp.async, three stages
// deep. So x is read once per 128 rows instead of once per stored block, and comes from shared
// memory for each of these; as the columns of a row are sorted, its entries of one chunk are
// neighbours.
//
// At density d a thread block with R block rows needs a column with probability 1 - (1 - d)^R and
// uses it d * R times: at 5 % and R = 128 (elements) every column, 6.4 times; with blocks of 16
// rows, R = 8, only every third. Serves layers of one group whose batch is a multiple of 16 bytes;
// the kernel of product.cuh serves the rest. A convolution's padding is multiplied as zeros: an
// infinite value makes NaN there, as in a dense convolution.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/values.cuh"
#include "cuda/walk.cuh"

namespace sk::cuda {

constexpr int kStagePoints = 64, kStageColumns = 128, kStages = 3;
constexpr int kStageWidth = kStagePoints / kWarp;

template <typename T>
constexpr size_t StagedBytes() {
  return sizeof(T) * kStages * kStageColumns * kStagePoints;
}

// What a thread copies of every chunk: a pack of points, of each (threads / packs)-th line.
template <typename T>
struct StageShare {
  static constexpr int kPack = 16 / sizeof(T), kPacks = kStagePoints / kPack;
  static constexpr int kStep = kWarp * kWarpsPerBlock / kPacks;
  static_assert(kWarp * kWarpsPerBlock % kPacks == 0, "a thread keeps its points");
  int line, point;  // the first line, and the first point within the tile
  __device__ StageShare() {
    const int thread = threadIdx.y * kWarp + threadIdx.x;
    line = thread / kPacks;
    point = thread % kPacks * kPack;
  }
};

// Starts the copies of one chunk [kStageColumns][kStagePoints]; zeros outside of x.
template <typename T, typename Source>
__device__ __forceinline__ void FetchChunk(T* tile, const T* x, int chunk, int cols,
                                           const StageShare<T>& share, const Source& source,
                                           const SourcePoint& at, bool mine) {
  for (int line = share.line; line < kStageColumns; line += StageShare<T>::kStep) {
    const int column = chunk * kStageColumns + line;
    const SourceColumn found = source.Column(column < cols ? column : 0, 0);
    const bool inside = mine && column < cols && source.Inside(at, found.tap);
    CopyAsync<16>(tile + line * kStagePoints + share.point,
                  x + (inside ? at.offset + found.offset : 0), inside ? 16 : 0);
  }
}

// Adds the entries of one row, from `next` on, in the chunk that starts at first_column; returns
// the first entry after them.
template <int kHeight, typename T>
__device__ __forceinline__ int AddEntries(float (&sum)[kHeight][kStageWidth], int next, int end,
                                          const T* tile, int first_column, const float* values,
                                          const int32_t* col, int bh, int height) {
  const int lane = threadIdx.x;
  while (next < end) {
    // Past the row's end: a column that is in no chunk.
    const int column = next + lane < end ? col[next + lane] : INT32_MAX;
    const int count = __popc(__ballot_sync(kAllLanes, column - first_column < kStageColumns));
    for (int k = 0; k < count; ++k) {
      const int local = __shfl_sync(kAllLanes, column, k) - first_column;
      float from[kStageWidth], value[kHeight];
      LoadShared<kStageWidth>(from, tile + local * kStagePoints + lane * kStageWidth);
      LoadValues(value, values + static_cast<int64_t>(next + k) * bh, height);
#pragma unroll
      for (int v = 0; v < kHeight; ++v)
#pragma unroll
        for (int i = 0; i < kStageWidth; ++i) sum[v][i] += value[v] * from[i];
    }
    next += count;
    if (count < kWarp) break;
  }
  return next;
}

template <typename T, int kHeight, typename Source>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 2)
    StagedKernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ values,
                 const float* __restrict__ bias, const int32_t* __restrict__ crow,
                 const int32_t* __restrict__ col, const int32_t* __restrict__ order, int block_rows,
                 int cols, int bh, int points, bool relu, Source source) {
  constexpr int kRows = 16 / kHeight, kTile = kStageColumns * kStagePoints;
  T* tiles = reinterpret_cast<T*>(DynamicShared());
  const int rows = source.RowsPerGroup(), lane = threadIdx.x;
  const int first_slot = (static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kRows;
  // Lane i keeps row i and the place in it: in registers of every lane, 16 rows' places made ptxas
  // spill.
  const bool has_row = first_slot + lane < block_rows;
  const int row_of_lane = has_row ? RowAt(order, first_slot + lane) : block_rows;
  const int chunks = (cols + kStageColumns - 1) / kStageColumns;
  const StageShare<T> share;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kStagePoints;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kStagePoints; tile < points;
       tile += step) {
    const bool copies = tile + share.point < points;
    const SourcePoint at = source.Point(copies ? static_cast<int>(tile) + share.point : 0);
    int next = has_row ? crow[row_of_lane] : 0;
    const int end = has_row ? crow[row_of_lane + 1] : 0;
    float sum[kRows][kHeight][kStageWidth] = {};
    for (int c = 0; c < kStages - 1; ++c) {
      if (c < chunks) FetchChunk(tiles + c * kTile, x, c, cols, share, source, at, copies);
      CommitCopies();  // empty ones too, so that the count of groups is that of chunks
    }
    for (int c = 0; c < chunks; ++c) {
      WaitCopies<kStages - 2>();
      // Chunk c is there for all, and all are done with chunk c - 1, whose place is filled next.
      __syncthreads();
      const int ahead = c + kStages - 1;
      if (ahead < chunks)
        FetchChunk(tiles + ahead % kStages * kTile, x, ahead, cols, share, source, at, copies);
      CommitCopies();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = __shfl_sync(kAllLanes, row_of_lane, i);
        const int after =
            AddEntries<kHeight>(sum[i], __shfl_sync(kAllLanes, next, i),
                                __shfl_sync(kAllLanes, end, i), tiles + c % kStages * kTile,
                                c * kStageColumns, values, col, bh, min(bh, rows - row * bh));
        if (lane == i) next = after;
      }
    }
    WaitCopies<0>();
    __syncthreads();  // the next tile's chunks overwrite these
    const int64_t point = tile + lane * kStageWidth;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int first = __shfl_sync(kAllLanes, row_of_lane, i) * bh;
      if (point >= points) continue;
#pragma unroll
      for (int v = 0; v < kHeight; ++v) {
        if (v >= bh || first + v >= rows) break;
        FinishRow<kStageWidth>(y + static_cast<int64_t>(first + v) * points + point, sum[i][v],
                               bias, first + v, relu);
      }
    }
  }
}

template <typename T, int kHeight, typename Source>
void LaunchStaged(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  const ConvGeometry& g = a.geometry;
  Launch(what, StagedKernel<T, kHeight, Source>,
         {Grid(s.block_rows, kWarpsPerBlock * (16 / kHeight), s.points, kStagePoints),
          dim3(kWarp, kWarpsPerBlock), StagedBytes<T>(), a.place.stream},
         static_cast<T*>(a.y), static_cast<const T*>(a.x), a.values, a.bias, a.crow, a.col, a.order,
         s.block_rows, static_cast<int>(g.kh * g.kw * g.in_channels), static_cast<int>(a.bh),
         s.points, a.relu, Source(g));
}

template <typename T, typename Source>
void StagedOf(const CallName& what, const ProductArgs& a, const ProductShape& s) {
  if (a.bh == 1) return LaunchStaged<T, 1, Source>(what, a, s);
  if (a.bh == 2) return LaunchStaged<T, 2, Source>(what, a, s);
  if (a.bh <= 4) return LaunchStaged<T, 4, Source>(what, a, s);
  if (a.bh <= 8) return LaunchStaged<T, 8, Source>(what, a, s);
  LaunchStaged<T, 16, Source>(what, a, s);
}

}  // namespace sk::cuda
