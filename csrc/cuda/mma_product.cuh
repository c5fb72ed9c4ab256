// Product with 16 x 16 and 32 x 32 blocks on the tensor cores: forward and input gradient of linear
// layers and convolutions.
//
// A thread block computes kRows points by one block of destination channels. It walks the stored
// blocks of these channels, as many at a time as fill rows of 128 bytes. cp.async copies the
// points' source channels (shifted by the block's tap, zeros outside of the image) and the block's
// values into one of three stages; two are under way while the third is multiplied. There is no
// im2col and no dense weight.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/mma_walk.cuh"

namespace sk::cuda {

constexpr int kMmaStages = 3;

// Sizes of a product: kWarps warps of kTiles x 16 points each.
template <typename T, int kBlock, int kWarps, int kTiles>
struct ProductTile {
  static constexpr int kThreads = kWarps * kWarp, kRows = kWarps * kTiles * 16;
  static constexpr int kChunks = kBlock / kChunk<T>;           // of one row of a block
  static constexpr int kItems = kBankChunks / kChunks;         // blocks of a stage
  static constexpr int kRowsPerThread = kRows * 2 / kThreads;  // two threads copy a row
  using Rows = Tile<T, kBankChunks>;
  static constexpr int kStageBytes = Rows::Bytes(kRows + kBlock);
};

// Operands of a launch, beside the index.
template <typename T>
struct ProductOperands {
  T* y;
  const T* x;
  const T* values;
  const float* bias;
  int points;  // of one phase
  bool relu;
  bool wide;   // rows of x in whole chunks
  bool pairs;  // rows of y in pairs
};

// Channels of a thread block's destination, and of those the ones that there are.
struct Target {
  int group, first, count;
};

// Starts the copies of up to kItems blocks into a stage: columns j * kChunks on are block j's.
template <typename P, typename T, int kBlock, typename Walk>
__device__ __forceinline__ void FetchBlocks(unsigned char* stage, const Entry (&entries)[P::kItems],
                                            int count, const Walk& walk, const SourceRow* rows,
                                            const Lattice<Walk::kTransposed>& lattice,
                                            const ProductOperands<T>& o, const Window& w,
                                            const Target& target) {
  const typename P::Rows points(stage), blocks(stage + P::Rows::Bytes(P::kRows));
  const int thread = threadIdx.x;
#pragma unroll
  for (int j = 0; j < P::kItems; ++j) {
    if (j >= count) break;
    const Shift shift = lattice.Of(walk.Tap(entries[j]));
    const int first = walk.Block(entries[j]) * kBlock, there = w.src_group - first;
    const T* channels = o.x + (static_cast<int64_t>(target.group) * w.src_group + first);
#pragma unroll
    for (int i = 0; i < P::kRowsPerThread; ++i) {
      const int pixel = SourcePixel(w, rows[i], shift), row = thread / 2 + i * P::kThreads / 2;
      const T* from = channels + (pixel < 0 ? 0 : static_cast<int64_t>(pixel) * w.src_channels);
#pragma unroll
      for (int c = 0; c < P::kChunks; c += 2) {
        const int chunk = c + thread % 2, left = pixel < 0 ? 0 : there - chunk * kChunk<T>;
        CopyChunk(points.Place(row, j * P::kChunks + chunk),
                  left > 0 ? from + chunk * kChunk<T> : o.x, left, o.wide);
      }
    }
    const T* value = o.values + static_cast<int64_t>(entries[j].value) * (kBlock * kBlock);
    const int height = Walk::kTransposed ? there : target.count;
    const int width = Walk::kTransposed ? target.count : there;
    for (int i = thread; i < kBlock * P::kChunks; i += P::kThreads) {
      const int row = i / P::kChunks, chunk = i % P::kChunks;
      CopyChunk(blocks.Place(row, j * P::kChunks + chunk), value + i * kChunk<T>,
                row < height ? width - chunk * kChunk<T> : 0, true);
    }
  }
}

// sums += points x blocks of one stage; the warp's points are from `first` on.
template <typename P, typename T, int kBlock, int kTiles, bool kTransposed>
__device__ __forceinline__ void MultiplyStage(float (&sums)[kTiles][kBlock / 8][4],
                                              unsigned char* stage, int count, int first) {
  const typename P::Rows points(stage), blocks(stage + P::Rows::Bytes(P::kRows));
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < P::kItems; ++j) {
    if (j >= count) break;
#pragma unroll
    for (int k = 0; k < kBlock; k += kDepth<T>) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        LoadA<false>(a[m], points, first + m * 16, j * kBlock + k, lane);
#pragma unroll
      for (int n = 0; n < kBlock / 16; ++n) {
        uint32_t b[2][2];
        // Columns of the stage's rows: block j's own from j * kBlock on.
        if constexpr (kTransposed)
          LoadB<true>(b, blocks, k, j * kBlock + n * 16, lane);
        else
          LoadB<false>(b, blocks, j * kBlock + k, n * 16, lane);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            MultiplyAccumulate<T>(sums[m][2 * n + half], a[m], b[half]);
      }
    }
  }
}

// Bias, ReLU and the store. Of a fragment a lane holds two neighbouring channels of rows lane / 4
// and 8 below.
template <typename T, int kBlock, int kTiles, bool kTransposed>
__device__ __forceinline__ void StoreSums(const float (&sums)[kTiles][kBlock / 8][4], int first,
                                          const Lattice<kTransposed>& lattice,
                                          const ProductOperands<T>& o, const Window& w,
                                          const Target& target) {
  const int lane = threadIdx.x % kWarp, column = target.group * w.dst_group + target.first;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int point = first + lane / 4 + i * 8;
    const int pixel = point < o.points ? lattice.Pixel(point) : -1;
    if (pixel < 0) continue;
    T* row = o.y + (static_cast<int64_t>(pixel) * w.dst_channels + column);
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      float out[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = n * 8 + lane % 4 * 2 + e;
        out[e] = sums[i / 2][n][i % 2 * 2 + e];
        if (channel < target.count && o.bias != nullptr) out[e] += __ldg(o.bias + column + channel);
        if (o.relu && out[e] < 0.0f) out[e] = 0.0f;  // not fmaxf, which would swallow NaN
      }
      const int channel = n * 8 + lane % 4 * 2;
      if (o.pairs && channel < target.count) {
        Store<2>(row + channel, out);
        continue;
      }
      if (channel < target.count) FromFloat(row[channel], out[0]);
      if (channel + 1 < target.count) FromFloat(row[channel + 1], out[1]);
    }
  }
}

template <typename P, typename Walk>
__device__ __forceinline__ int ReadEntries(Entry (&entries)[P::kItems], Walk& walk) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < P::kItems; ++j)
    if (walk.Next(entries[j])) ++count;
  return count;
}

// Thread blocks that shall fit on a multiprocessor. Three of the large TF32 tiles would spill.
template <typename T>
constexpr int MinProductBlocks(int block, int tiles) {
  return tiles == 1 ? 5 : sizeof(T) == 4 && block == 32 ? 2 : 3;
}

template <typename T, int kBlock, int kWarps, int kTiles, typename Walk>
__global__ void __launch_bounds__(kWarps* kWarp, MinProductBlocks<T>(kBlock, kTiles))
    BlockProductKernel(ProductOperands<T> o, typename Walk::Index index, Window w) {
  using P = ProductTile<T, kBlock, kWarps, kTiles>;
  unsigned char* stages = DynamicShared();
  const int phases = Walk::kTransposed ? w.stride_h * w.stride_w : 1;
  const int list = blockIdx.x, block = list % w.dst_blocks, part = list / w.dst_blocks;
  const Target target = {part / phases, block * kBlock, min(kBlock, w.dst_group - block * kBlock)};
  const Lattice<Walk::kTransposed> lattice(w, part % phases);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * (kTiles * 16);
  // The grid's second dimension is bounded, so a thread block may have several tiles to do.
  for (int64_t tile = blockIdx.y; tile * P::kRows < o.points; tile += gridDim.y) {
    const int first = static_cast<int>(tile) * P::kRows;
    SourceRow rows[P::kRowsPerThread];
#pragma unroll
    for (int i = 0; i < P::kRowsPerThread; ++i)
      rows[i] =
          lattice.Source(first + static_cast<int>(threadIdx.x) / 2 + i * P::kThreads / 2, o.points);
    Walk walk(index, w, lattice, target.group, block);
    Entry entries[P::kItems];  // of the stage that is fetched next
    int ahead = ReadEntries<P>(entries, walk);
    int counts[kMmaStages] = {};  // blocks in the stages, the one to be multiplied first
    int slot = 0;
#pragma unroll
    for (int s = 0; s < kMmaStages - 1; ++s) {
      counts[s] = ahead;
      FetchBlocks<P, T, kBlock>(stages + s * P::kStageBytes, entries, ahead, walk, rows, lattice, o,
                                w, target);
      CommitCopies();  // empty ones too, so that the count of groups is that of stages
      ahead = ReadEntries<P>(entries, walk);
    }
    float sums[kTiles][kBlock / 8][4] = {};
    while (counts[0] > 0) {
      WaitCopies<kMmaStages - 2>();
      // This stage is there for all, and all are done with the one before, which is filled next.
      __syncthreads();
      const int free = slot == 0 ? kMmaStages - 1 : slot - 1;
      counts[kMmaStages - 1] = ahead;
      FetchBlocks<P, T, kBlock>(stages + free * P::kStageBytes, entries, ahead, walk, rows, lattice,
                                o, w, target);
      CommitCopies();
      ahead = ReadEntries<P>(entries, walk);
      MultiplyStage<P, T, kBlock, kTiles, Walk::kTransposed>(sums, stages + slot * P::kStageBytes,
                                                             counts[0], warp_row);
#pragma unroll
      for (int s = 0; s < kMmaStages - 1; ++s) counts[s] = counts[s + 1];
      slot = slot == kMmaStages - 1 ? 0 : slot + 1;
    }
    WaitCopies<0>();
    __syncthreads();  // the next tile's copies overwrite these
    StoreSums<T, kBlock, kTiles>(sums, first + warp_row, lattice, o, w, target);
  }
}

template <typename T, int kBlock, int kWarps, int kTiles, typename Walk>
void LaunchBlockProduct(const CallName& what, const ProductOperands<T>& o,
                        const typename Walk::Index& index, const Window& w, void* stream) {
  using P = ProductTile<T, kBlock, kWarps, kTiles>;
  const int phases = Walk::kTransposed ? w.stride_h * w.stride_w : 1;
  Launch(what, BlockProductKernel<T, kBlock, kWarps, kTiles, Walk>,
         {Grid(int64_t(w.groups) * phases * w.dst_blocks, 1, o.points, P::kRows), dim3(P::kThreads),
          size_t(kMmaStages) * P::kStageBytes, stream},
         o, index, w);
}

// Few points go by tiles of 32: less of them is empty, and there are more thread blocks.
template <typename T, int kBlock, typename Walk>
void BlockProductOf(const CallName& what, const ProductOperands<T>& o,
                    const typename Walk::Index& index, const Window& w, void* stream) {
  if (o.points <= 64) return LaunchBlockProduct<T, kBlock, 2, 1, Walk>(what, o, index, w, stream);
  LaunchBlockProduct<T, kBlock, 4, 2, Walk>(what, o, index, w, stream);
}

}  // namespace sk::cuda
