// Tiles in shared memory and the fragments that the tensor cores read from them.
//
// A tile is rows of 16-byte chunks. Chunks are swizzled, so that the 8 rows of one matrix of
// ldmatrix, and the words that a warp reads one by one for a transposed float32 fragment, lie in
// different banks.
#pragma once

#include "cuda/mma_intrinsics.cuh"
#include "cuda/pack.cuh"

namespace sk::cuda {

constexpr int kChunkBytes = 16, kBankChunks = 8;  // 8 chunks: all banks once

// Elements of a chunk, and the depth of one mma: two chunks.
template <typename T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kDepth = 2 * kChunk<T>;

// Rows of kPitch chunks, a power of two up to kBankChunks.
template <typename T, int kPitch>
class Tile {
 public:
  __host__ __device__ static constexpr int Bytes(int rows) { return rows * kPitch * kChunkBytes; }
  __device__ __forceinline__ explicit Tile(unsigned char* begin) : begin_(begin) {}
  __device__ __forceinline__ unsigned char* Place(int row, int chunk) const {
    // Rows that begin in the same bank: their number, its lowest bit made the highest. Rows 0 to 3
    // then differ in the upper bits, and a pair of chunks stays a pair.
    const int key = row * kPitch / kBankChunks % kPitch;
    const int swizzle = key * 2 % kPitch | key * 2 / kPitch;
    return begin_ + (row * kPitch + (chunk ^ swizzle)) * kChunkBytes;
  }
  __device__ __forceinline__ uint32_t Word(int row, int column) const {
    return *reinterpret_cast<const uint32_t*>(Place(row, column / kChunk<T>) +
                                              column % kChunk<T> * static_cast<int>(sizeof(T)));
  }

 private:
  unsigned char* begin_;
};

template <typename T>
__device__ __forceinline__ void Round(uint32_t& word) {
  if constexpr (sizeof(T) == 4) word = RoundToTf32(word);
}

// A, 16 x kDepth, from (m, k) on. kTransposed: the rows of the tile are k, else they are m.
template <bool kTransposed, typename T, int kPitch>
__device__ __forceinline__ void LoadA(uint32_t (&a)[4], const Tile<T, kPitch>& tile, int m, int k,
                                      int lane) {
  const int low = lane / 8 % 2, high = lane / 16;  // which of the four matrices
  if constexpr (!kTransposed) {
    LoadMatrices<false>(a, tile.Place(m + lane % 8 + low * 8, k / kChunk<T> + high));
  } else if constexpr (sizeof(T) == 2) {
    LoadMatrices<true>(a, tile.Place(k + lane % 8 + high * 8, m / kChunk<T> + low));
  } else {  // ldmatrix transposes elements of 16 bits only
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = tile.Word(k + lane % 4 + i / 2 * 4, m + lane / 4 + i % 2 * 8);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) Round<T>(a[i]);
}

// B, kDepth x 16, from (k, n) on: the fragments of two products side by side. kTransposed: the rows
// of the tile are k, else they are n.
template <bool kTransposed, typename T, int kPitch>
__device__ __forceinline__ void LoadB(uint32_t (&b)[2][2], const Tile<T, kPitch>& tile, int k,
                                      int n, int lane) {
  const int low = lane / 8 % 2, high = lane / 16;
  uint32_t words[4];
  if constexpr (!kTransposed) {
    LoadMatrices<false>(words, tile.Place(n + lane % 8 + high * 8, k / kChunk<T> + low));
  } else if constexpr (sizeof(T) == 2) {
    LoadMatrices<true>(words, tile.Place(k + lane % 8 + low * 8, n / kChunk<T> + high));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = tile.Word(k + lane % 4 + i % 2 * 4, n + lane / 4 + i / 2 * 8);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Round<T>(words[i]);
    b[i / 2][i % 2] = words[i];
  }
}

// Starts the copy of a chunk: `count` elements (none below 1, at most a whole chunk), then zeros.
// wide: the source is a multiple of 16 bytes; others go by single elements, not asynchronously.
template <typename T>
__device__ __forceinline__ void CopyChunk(unsigned char* to, const T* from, int count, bool wide) {
  count = count < 0 ? 0 : count < kChunk<T> ? count : kChunk<T>;
  if (wide) {
    CopyAsync<kChunkBytes>(to, from, count * static_cast<int>(sizeof(T)));
    return;
  }
  using Bits = typename PackOf<sizeof(T), 1>::Type;
  // Not unrolled: the fast copies beside it are, and this would be most of the kernel's code.
#pragma unroll 1
  for (int i = 0; i < kChunk<T>; ++i)
    reinterpret_cast<Bits*>(to)[i] =
        i < count ? __ldg(reinterpret_cast<const Bits*>(from) + i) : Bits(0);
}

}  // namespace sk::cuda
