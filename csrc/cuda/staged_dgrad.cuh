// dgrad with grad staged in shared memory: a thread block computes 128 input channels for 64
// points, and streams the rows of grad, shifted by one tap after the other, through shared memory
// in chunks of up to 128 rows (whole block rows), as staged.cuh does with x. At density d a chunk's
// row is used by d * 128 channels of a thread block, whatever the height of the blocks.
//
// Serves what staged.cuh does, and convolutions of stride 1: of stride s only one in s * s points
// has an output pixel for a tap, the others would be multiplied as zeros.
#pragma once

#include "cuda/dgrad.cuh"
#include "cuda/staged.cuh"

namespace sk::cuda {

constexpr int kDgradChannels = 16;  // of one warp

// One chunk: a tap, and the block rows [first_block, first_block + blocks).
struct GradChunk {
  int tap, first_block, blocks;
};

// Starts the copies of a chunk's rows; zeros where no output pixel used the point by this tap.
template <typename T, typename Target>
__device__ __forceinline__ void FetchGrad(T* tile, const T* grad, const GradChunk& chunk, int bh,
                                          int rows, int out_points, const StageShare<T>& share,
                                          const Target& target, int point, bool mine) {
  int64_t offset = 0;
  const bool used = mine && target.Find(point, chunk.tap, &offset);
  const int first = chunk.first_block * bh;
  for (int line = share.line; line < chunk.blocks * bh; line += StageShare<T>::kStep) {
    const bool inside = used && first + line < rows;
    const int64_t from = static_cast<int64_t>(first + line) * out_points + offset;
    CopyAsync<16>(tile + line * kStagePoints + share.point, grad + (inside ? from : 0),
                  inside ? 16 : 0);
  }
}

// Adds the blocks of one column, from `next` on, in the chunk; returns the first one after them.
template <typename T>
__device__ __forceinline__ int AddBlocks(float (&sum)[kStageWidth], int next, int end,
                                         const T* tile, const GradChunk& chunk, const float* values,
                                         const int32_t* t_row, const int32_t* t_perm, int bh,
                                         int rows) {
  const int lane = threadIdx.x;
  while (next < end) {
    // Past the column's end: a block row that is in no chunk.
    const bool stored = next + lane < end;
    const int block_row = stored ? t_row[next + lane] : INT32_MAX;
    const int place = stored ? t_perm[next + lane] : 0;
    const int count =
        __popc(__ballot_sync(kAllLanes, block_row - chunk.first_block < chunk.blocks));
    for (int k = 0; k < count; ++k) {
      const int at = __shfl_sync(kAllLanes, block_row, k);
      const float* value = values + static_cast<int64_t>(__shfl_sync(kAllLanes, place, k)) * bh;
      const T* from = tile + (at - chunk.first_block) * bh * kStagePoints + lane * kStageWidth;
      const int height = min(bh, rows - at * bh);
      for (int v = 0; v < height; ++v) {
        float g[kStageWidth];
        LoadShared<kStageWidth>(g, from + v * kStagePoints);
        const float w = __ldg(value + v);
#pragma unroll
        for (int i = 0; i < kStageWidth; ++i) sum[i] += w * g[i];
      }
    }
    next += count;
    if (count < kWarp) break;
  }
  return next;
}

template <typename T, typename Target>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 2)
    StagedDgradKernel(T* __restrict__ dx, const T* __restrict__ grad,
                      const float* __restrict__ values, const int32_t* __restrict__ t_crow,
                      const int32_t* __restrict__ t_row, const int32_t* __restrict__ t_perm,
                      const int32_t* __restrict__ order, int channels, int rows, int bh,
                      int in_points, int out_points, Target target) {
  constexpr int kTile = kStageColumns * kStagePoints;
  T* tiles = reinterpret_cast<T*>(DynamicShared());
  const int lane = threadIdx.x, block_rows = (rows + bh - 1) / bh;
  const int first_slot =
      (static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y) * kDgradChannels;
  const bool has_channel = lane < kDgradChannels && first_slot + lane < channels;
  const int channel_of_lane = has_channel ? RowAt(order, first_slot + lane) : 0;
  const int blocks = kStageColumns / bh, per_tap = (block_rows + blocks - 1) / blocks;
  const int chunks = target.Taps() * per_tap;
  const auto chunk_at = [&](int c) { return GradChunk{c / per_tap, c % per_tap * blocks, blocks}; };
  const StageShare<T> share;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kStagePoints;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kStagePoints; tile < in_points;
       tile += step) {
    const bool copies = tile + share.point < in_points;
    const int copied = copies ? static_cast<int>(tile) + share.point : 0;
    int next = 0, end = 0;
    float sum[kDgradChannels][kStageWidth] = {};
    for (int c = 0; c < kStages - 1; ++c) {
      if (c < chunks)
        FetchGrad(tiles + c * kTile, grad, chunk_at(c), bh, rows, out_points, share, target, copied,
                  copies);
      CommitCopies();  // empty ones too, so that the count of groups is that of chunks
    }
    for (int c = 0; c < chunks; ++c) {
      WaitCopies<kStages - 2>();
      // Chunk c is there for all, and all are done with chunk c - 1, whose place is filled next.
      __syncthreads();
      const int ahead = c + kStages - 1;
      if (ahead < chunks)
        FetchGrad(tiles + ahead % kStages * kTile, grad, chunk_at(ahead), bh, rows, out_points,
                  share, target, copied, copies);
      CommitCopies();
      const GradChunk chunk = chunk_at(c);
      if (chunk.first_block == 0 && has_channel) {  // lane i keeps the place in column i
        next = t_crow[chunk.tap * channels + channel_of_lane];
        end = t_crow[chunk.tap * channels + channel_of_lane + 1];
      }
#pragma unroll
      for (int i = 0; i < kDgradChannels; ++i) {
        const int after =
            AddBlocks(sum[i], __shfl_sync(kAllLanes, next, i), __shfl_sync(kAllLanes, end, i),
                      tiles + c % kStages * kTile, chunk, values, t_row, t_perm, bh, rows);
        if (lane == i) next = after;
      }
    }
    WaitCopies<0>();
    __syncthreads();  // the next tile's chunks overwrite these
    const int64_t point = tile + lane * kStageWidth;
#pragma unroll
    for (int i = 0; i < kDgradChannels; ++i) {
      const int channel = __shfl_sync(kAllLanes, channel_of_lane, i);
      if (point < in_points && first_slot + i < channels)
        Store<kStageWidth>(dx + (static_cast<int64_t>(channel) * in_points + point), sum[i]);
    }
  }
}

template <typename T, typename Target>
void StagedDgradOf(const CallName& what, const DgradArgs& a, const DgradShape& s) {
  Launch(what, StagedDgradKernel<T, Target>,
         {Grid(s.in_channels, kWarpsPerBlock * kDgradChannels, s.in_points, kStagePoints),
          dim3(kWarp, kWarpsPerBlock), StagedBytes<T>(), a.place.stream},
         static_cast<T*>(a.dx), static_cast<const T*>(a.grad), a.values, a.t_crow, a.t_row,
         a.t_perm, a.order, s.in_channels, s.rows_per_group, static_cast<int>(a.bh), s.in_points,
         s.out_points, Target(a.geometry));
}

}  // namespace sk::cuda
