// Forward of a linear layer with x staged in shared memory: a thread block computes 8 x kRows block
// rows for 64 batch elements, and streams x through shared memory in chunks of 128 columns, by
// cp.async, three stages deep. So x is read once per 128 rows instead of once per stored element,
// and comes from shared memory for each of these; as the columns of a row are sorted, its entries
// of one chunk are neighbours.
//
// Pays where a block's rows together need most columns. Serves batches whose rows are multiples of
// 16 bytes; the kernel of product.cuh serves the rest.
#pragma once

#include "cuda/geometry.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/values.cuh"

namespace sk::cuda {

constexpr int kStagePoints = 64, kStageColumns = 128, kStages = 3;
constexpr int kStageWidth = kStagePoints / kWarp;

// Starts the copies of one chunk [kStageColumns][kStagePoints]; zeros outside of x.
template <typename T>
__device__ __forceinline__ void FetchChunk(T* tile, const T* x, int chunk, int first_point,
                                           int cols, int batch) {
  constexpr int kPack = 16 / sizeof(T), kPacks = kStagePoints / kPack;
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  for (int i = thread; i < kStageColumns * kPacks; i += kWarp * kWarpsPerBlock) {
    const int column = chunk * kStageColumns + i / kPacks;
    const int point = first_point + i % kPacks * kPack;
    const bool inside = column < cols && point < batch;
    const int64_t from = inside ? static_cast<int64_t>(column) * batch + point : 0;
    CopyAsync<16>(tile + i * kPack, x + from, inside ? 16 : 0);
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

template <typename T, int kHeight>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 2)
    StagedKernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ values,
                 const float* __restrict__ bias, const int32_t* __restrict__ crow,
                 const int32_t* __restrict__ col, int block_rows, int rows, int cols, int bh,
                 int batch, bool relu) {
  constexpr int kRows = 16 / kHeight, kTile = kStageColumns * kStagePoints;
  T* tiles = reinterpret_cast<T*>(DynamicShared());
  const int first_row = (static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kRows;
  const int chunks = (cols + kStageColumns - 1) / kStageColumns;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kStagePoints;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kStagePoints; tile < batch; tile += step) {
    const int first_point = static_cast<int>(tile);
    // Lane i keeps the place in row i: in registers of every lane, 16 rows' places made ptxas
    // spill.
    const int lane = threadIdx.x, row_of_lane = min(first_row + lane, block_rows - 1);
    int next = crow[row_of_lane];
    const int end = first_row + lane < block_rows ? crow[row_of_lane + 1] : next;
    float sum[kRows][kHeight][kStageWidth] = {};
    for (int c = 0; c < kStages - 1; ++c) {
      if (c < chunks) FetchChunk(tiles + c * kTile, x, c, first_point, cols, batch);
      CommitCopies();  // empty ones too, so that the count of groups is that of chunks
    }
    for (int c = 0; c < chunks; ++c) {
      WaitCopies<kStages - 2>();
      // Chunk c is there for all, and all are done with chunk c - 1, whose place is filled next.
      __syncthreads();
      const int ahead = c + kStages - 1;
      if (ahead < chunks)
        FetchChunk(tiles + ahead % kStages * kTile, x, ahead, first_point, cols, batch);
      CommitCopies();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int after = AddEntries<kHeight>(
            sum[i], __shfl_sync(kAllLanes, next, i), __shfl_sync(kAllLanes, end, i),
            tiles + c % kStages * kTile, c * kStageColumns, values, col, bh,
            min(bh, rows - (first_row + i) * bh));
        if (lane == i) next = after;
      }
    }
    WaitCopies<0>();
    __syncthreads();  // the next tile's chunks overwrite these
    const int point = first_point + lane * kStageWidth;
    if (point >= batch) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int v = 0; v < kHeight; ++v) {
        const int row = (first_row + i) * bh + v;
        if (v >= bh || row >= rows) break;
        FinishRow<kStageWidth>(y + static_cast<int64_t>(row) * batch + point, sum[i][v], bias, row,
                               relu);
      }
  }
}

template <typename T, int kHeight>
void LaunchStaged(const CallName& what, const ProductArgs& a, int block_rows) {
  constexpr int kRowsPerBlock = kWarpsPerBlock * (16 / kHeight);
  Launch(
      what, StagedKernel<T, kHeight>,
      {Grid(block_rows, kRowsPerBlock, a.geometry.batch, kStagePoints), dim3(kWarp, kWarpsPerBlock),
       sizeof(T) * kStages * kStageColumns * kStagePoints, a.place.stream},
      static_cast<T*>(a.y), static_cast<const T*>(a.x), a.values, a.bias, a.crow, a.col, block_rows,
      static_cast<int>(a.geometry.out_channels), static_cast<int>(a.geometry.in_channels),
      static_cast<int>(a.bh), static_cast<int>(a.geometry.batch), a.relu);
}

template <typename T>
void StagedOf(const CallName& what, const ProductArgs& a, int block_rows) {
  if (a.bh == 1) return LaunchStaged<T, 1>(what, a, block_rows);
  if (a.bh == 2) return LaunchStaged<T, 2>(what, a, block_rows);
  if (a.bh <= 4) return LaunchStaged<T, 4>(what, a, block_rows);
  if (a.bh <= 8) return LaunchStaged<T, 8>(what, a, block_rows);
  LaunchStaged<T, 16>(what, a, block_rows);
}

}  // namespace sk::cuda
