// Weight gradient of 16 x 16 and 32 x 32 blocks on the tensor cores: dV = grad^T x over the points.
//
// A thread block computes up to kPer neighbouring blocks of one block row over one part of the
// points, so that the row's channels of grad are read once for all of them. Points are the depth of
// the products: 64 at a time (32 in TF32) go through three stages in shared memory by cp.async. A
// second kernel (wgrad.cuh) adds the parts up in order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/mma_window.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

constexpr int kWgradStages = 3, kWgradWarps = 4;

template <typename T, int kBlock>
struct WgradTile {
  static constexpr int kThreads = kWgradWarps * kWarp;
  static constexpr int kPoints = 8 * kChunk<T>;    // of a stage
  static constexpr int kColumns = 16 * kChunk<T>;  // of all blocks together
  static constexpr int kPer = kColumns / kBlock;
  static constexpr int kWarpColumns = kColumns / kWgradWarps;
  static constexpr int kChunks = kBlock / kChunk<T>;
  static constexpr int kSplit = kThreads / kPoints;  // threads that copy a row
  using Rows = Tile<T, kChunks>;
  static constexpr int kTileBytes = Rows::Bytes(kPoints);
  static constexpr int kStageBytes = (1 + kPer) * kTileBytes;
};

template <typename T>
struct WgradOperands {
  float* out;  // [parts][capacity][kBlock][kBlock]
  const T* grad;
  const T* x;
  const int32_t* crow;
  const int32_t* col;
  int block_rows, capacity;
  int points, part;  // points of all, and of one part
  bool wide;
};

// Blocks `first` on of one block row, and where they are in x and grad.
template <int kPer>
struct Neighbours {
  int first, count;
  int group, row;     // of grad: first channel within the group
  int channel[kPer];  // of x: first channel within the group
  Shift shift[kPer];
};

// Row i owns the slots from crow[i] / kPer + i on: as many as it fills, or one more. So a grid of
// capacity / kPer + block_rows slots holds every pattern.
template <int kPer>
__device__ __forceinline__ int RowOfSlot(const int32_t* crow, int block_rows, int slot) {
  int low = 0, high = block_rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(crow + middle) / kPer + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <typename P, typename T, int kBlock>
__device__ __forceinline__ Neighbours<P::kPer> FindNeighbours(const WgradOperands<T>& o,
                                                              const Window& w, int slot) {
  Neighbours<P::kPer> n = {};
  if (o.block_rows == 0) return n;
  const int row = RowOfSlot<P::kPer>(o.crow, o.block_rows, slot);
  const int begin = __ldg(o.crow + row), end = __ldg(o.crow + row + 1);
  n.first = begin + (slot - begin / P::kPer - row) * P::kPer;
  n.count = min(P::kPer, max(0, end - n.first));
  n.group = row / w.dst_blocks;
  n.row = row % w.dst_blocks * kBlock;
  const Lattice<false> lattice(w, 0);
#pragma unroll
  for (int j = 0; j < P::kPer; ++j) {
    const int column = j < n.count ? __ldg(o.col + n.first + j) : 0;
    n.channel[j] = column % w.src_blocks * kBlock;
    n.shift[j] = lattice.Of(column / w.src_blocks);
  }
  return n;
}

// Starts the copies of a stage: points `first` on, zeros from `end` on.
template <typename P, typename T, int kBlock>
__device__ __forceinline__ void FetchPoints(unsigned char* stage, int first, int end,
                                            const Neighbours<P::kPer>& n, const WgradOperands<T>& o,
                                            const Window& w) {
  const int row = static_cast<int>(threadIdx.x) / P::kSplit, part = threadIdx.x % P::kSplit;
  const int point = first + row;
  const SourceRow source = Lattice<false>(w, 0).Source(point, end);
  const typename P::Rows grads(stage);
  const T* channels = o.grad + (static_cast<int64_t>(n.group) * w.dst_group + n.row);
  const T* from = channels + static_cast<int64_t>(point < end ? point : 0) * w.dst_channels;
#pragma unroll
  for (int c = 0; c < P::kChunks; c += P::kSplit) {
    const int chunk = c + part, left = w.dst_group - n.row - chunk * kChunk<T>;
    const bool there = point < end && left > 0;
    CopyChunk(grads.Place(row, chunk), there ? from + chunk * kChunk<T> : o.grad, there ? left : 0,
              o.wide);
  }
#pragma unroll
  for (int j = 0; j < P::kPer; ++j) {
    if (j >= n.count) break;
    const typename P::Rows xs(stage + (1 + j) * P::kTileBytes);
    const int pixel = SourcePixel(w, source, n.shift[j]);
    const int64_t channel = static_cast<int64_t>(n.group) * w.src_group + n.channel[j];
    const T* x = o.x + (static_cast<int64_t>(max(pixel, 0)) * w.src_channels + channel);
#pragma unroll
    for (int c = 0; c < P::kChunks; c += P::kSplit) {
      const int chunk = c + part, left = w.src_group - n.channel[j] - chunk * kChunk<T>;
      const bool there = pixel >= 0 && left > 0;
      CopyChunk(xs.Place(row, chunk), there ? x + chunk * kChunk<T> : o.x, there ? left : 0,
                o.wide);
    }
  }
}

// sums += grad^T x of one stage, for the warp's columns of the blocks.
template <typename P, typename T, int kBlock>
__device__ __forceinline__ void MultiplyPoints(float (&sums)[kBlock / 16][P::kWarpColumns / 8][4],
                                               unsigned char* stage, int count) {
  const int lane = threadIdx.x % kWarp;
  const int first = static_cast<int>(threadIdx.x) / kWarp * P::kWarpColumns;
  const typename P::Rows grads(stage);
#pragma unroll
  for (int k = 0; k < P::kPoints; k += kDepth<T>) {
    uint32_t a[kBlock / 16][4];
#pragma unroll
    for (int m = 0; m < kBlock / 16; ++m) LoadA<true>(a[m], grads, m * 16, k, lane);
#pragma unroll
    for (int n = 0; n < P::kWarpColumns / 16; ++n) {
      const int column = first + n * 16, j = column / kBlock;
      if (j >= count) break;
      uint32_t b[2][2];
      const typename P::Rows xs(stage + (1 + j) * P::kTileBytes);
      LoadB<true>(b, xs, k, column % kBlock, lane);
#pragma unroll
      for (int m = 0; m < kBlock / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          MultiplyAccumulate<T>(sums[m][2 * n + half], a[m], b[half]);
    }
  }
}

// The sums of the warp's columns, and 0 outside of partial blocks.
template <typename P, typename T, int kBlock>
__device__ __forceinline__ void StoreBlocks(
    float* out, const float (&sums)[kBlock / 16][P::kWarpColumns / 8][4],
    const Neighbours<P::kPer>& n, const Window& w) {
  const int lane = threadIdx.x % kWarp;
  const int first = static_cast<int>(threadIdx.x) / kWarp * P::kWarpColumns;
#pragma unroll
  for (int i = 0; i < P::kWarpColumns / 8; ++i) {
    const int j = (first + i * 8) / kBlock, column = (first + i * 8) % kBlock + lane % 4 * 2;
    if (j >= n.count) break;
    int channel = 0;
#pragma unroll
    for (int u = 0; u < P::kPer; ++u)
      if (u == j) channel = n.channel[u];
    const int width = w.src_group - channel;
#pragma unroll
    for (int m = 0; m < kBlock / 8; ++m) {
      const int row = m * 8 + lane / 4;
      const bool there = n.row + row < w.dst_group;
      const float* sum = sums[m / 2][i] + m % 2 * 2;
      *reinterpret_cast<float2*>(out + ((n.first + j) * int64_t(kBlock) + row) * kBlock + column) =
          float2{there && column < width ? sum[0] : 0.0f,
                 there && column + 1 < width ? sum[1] : 0.0f};
    }
  }
}

template <typename T, int kBlock>
__global__ void __launch_bounds__(kWgradWarps* kWarp, 3)
    BlockWgradKernel(WgradOperands<T> o, Window w) {
  using P = WgradTile<T, kBlock>;
  unsigned char* stages = DynamicShared();
  const int slot = blockIdx.x;
  float* out = o.out + static_cast<int64_t>(blockIdx.y) * o.capacity * (kBlock * kBlock);
  const Neighbours<P::kPer> n = FindNeighbours<P, T, kBlock>(o, w, slot);
  if (n.count > 0) {
    const int begin = static_cast<int>(blockIdx.y) * o.part;
    const int end = begin + min(o.points - begin, o.part);  // begin + part may wrap
#pragma unroll
    for (int s = 0; s < kWgradStages - 1; ++s) {
      const int first = begin + s * P::kPoints;
      if (first < end) FetchPoints<P, T, kBlock>(stages + s * P::kStageBytes, first, end, n, o, w);
      CommitCopies();  // empty ones too, so that the count of groups is that of stages
    }
    float sums[kBlock / 16][P::kWarpColumns / 8][4] = {};
    int stage = 0;
    for (int first = begin; first < end; first += P::kPoints) {
      WaitCopies<kWgradStages - 2>();
      // This stage is there for all, and all are done with the one before, which is filled next.
      __syncthreads();
      const int ahead = first + (kWgradStages - 1) * P::kPoints;
      const int free = stage == 0 ? kWgradStages - 1 : stage - 1;
      if (ahead < end)
        FetchPoints<P, T, kBlock>(stages + free * P::kStageBytes, ahead, end, n, o, w);
      CommitCopies();
      MultiplyPoints<P, T, kBlock>(sums, stages + stage * P::kStageBytes, n.count);
      stage = stage == kWgradStages - 1 ? 0 : stage + 1;
    }
    WaitCopies<0>();
    StoreBlocks<P, T, kBlock>(out, sums, n, w);
  }
  // This slot's share of what lies past the stored blocks.
  const int64_t stored = __ldg(o.crow + o.block_rows);
  const int64_t from = static_cast<int64_t>(slot) * P::kPer, tail = from < stored ? stored : from;
  const int64_t to = min(static_cast<int64_t>(o.capacity), from + P::kPer);
  for (int64_t i = tail * (kBlock * kBlock) + threadIdx.x; i < to * (kBlock * kBlock);
       i += P::kThreads)
    out[i] = 0.0f;
}

// How the points are cut: depends on shapes and capacity only, so that equal calls give equal bits
// on every GPU. Enough thread blocks for a large one (132 multiprocessors), at least four stages
// per part, at most 64 parts and 64 MiB of partial sums.
struct WgradParts {
  int64_t slots, part, count;
};
template <typename T, int kBlock>
WgradParts CutPoints(int64_t block_rows, int64_t capacity, int64_t points) {
  using P = WgradTile<T, kBlock>;
  constexpr int64_t kWanted = 4 * 132, kMost = 64, kMostBytes = 64 << 20;
  const int64_t slots = capacity / P::kPer + block_rows + 1;  // one more: no rows, yet a tail
  const int64_t stages = (points + P::kPoints - 1) / P::kPoints;
  const int64_t bytes = capacity * kBlock * kBlock * int64_t(sizeof(float));
  int64_t parts = (kWanted + slots - 1) / slots;
  for (const int64_t most : {stages / 4, kMost, kMostBytes / (bytes > 0 ? bytes : 1)})
    parts = parts < most ? parts : most;
  parts = parts > 1 ? parts : 1;
  const int64_t each = stages > 0 ? (stages + parts - 1) / parts : 1;
  return {slots, each * P::kPoints, stages > 0 ? (stages + each - 1) / each : 1};
}

template <typename T, int kBlock>
void BlockWgradOf(const CallName& what, const BlockWgradArgs& a, const Window& w, int points,
                  bool wide) {
  using P = WgradTile<T, kBlock>;
  const int block_rows = w.groups * w.dst_blocks;
  const WgradParts cut = CutPoints<T, kBlock>(block_rows, a.capacity, points);
  float* out = cut.count == 1 ? a.dvalues : static_cast<float*>(a.workspace);
  const WgradOperands<T> o = {out,
                              static_cast<const T*>(a.grad),
                              static_cast<const T*>(a.x),
                              a.crow,
                              a.col,
                              block_rows,
                              static_cast<int>(a.capacity),
                              points,
                              static_cast<int>(cut.part),
                              wide};
  Launch(what, BlockWgradKernel<T, kBlock>,
         {dim3(static_cast<unsigned>(cut.slots), static_cast<unsigned>(cut.count)),
          dim3(P::kThreads), size_t(kWgradStages) * P::kStageBytes, a.place.stream},
         o, w);
  if (cut.count == 1) return;
  const int64_t count = a.capacity * kBlock * kBlock;
  Launch(what, AddPartsKernel,
         {dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, a.place.stream},
         a.dvalues, static_cast<const float*>(a.workspace), count, static_cast<int>(cut.count));
}

}  // namespace sk::cuda
