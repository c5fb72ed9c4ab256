// How a warp walks through the entries of a sparse row (or column) and through its points.
#pragma once

#include "cuda/pack.cuh"

namespace sk::cuda {

// The points of a lane: kSteps runs of kPack neighbours; one step takes the warp 32 * kPack points
// further. A pack needs rows that begin at multiples of kPack elements. Single elements in steps
// need nothing and move whole lines too, at kPack times as many loads: where the batch is odd, the
// rows of x agree in their residue mod 4 with that of y for every fourth column only, so vector
// loads between a head and a tail would serve a quarter of the entries, and the lanes of the others
// would lie 4 elements apart.
template <int kPack_, int kSteps_>
struct Lanes {
  static constexpr int kPack = kPack_, kSteps = kSteps_;
  static constexpr int kTile = kWarp * kPack * kSteps;
  __device__ static __forceinline__ int64_t Point(int64_t tile, int step) {
    return tile + (step * kWarp + static_cast<int>(threadIdx.x)) * kPack;
  }
};

// Entries [group, group + kEntries) of an index array or of elements, kEntries 4 or 1. group is a
// multiple of that and may lie before the row's begin: entries of the row before it are read and
// not used (Gale et al., SC'20, "reverse offset memory alignment"). `whole`: the array is 16-byte
// aligned and has all four; else only those in [begin, end) are read.
template <int kEntries, typename T>
__device__ __forceinline__ void LoadEntries(T (&to)[kEntries], const T* from, int group, int begin,
                                            int end, bool whole) {
  static_assert(sizeof(T) == 4, "int32_t or float");
  if (kEntries == 4 && whole) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(from + group));
    const T* each = reinterpret_cast<const T*>(&four);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) to[i] = each[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i)
    to[i] = group + i >= begin && group + i < end ? __ldg(from + group + i) : T(0);
}

// Values `first` and following of one block; past `height` anything: sums of rows that are not
// there are not stored. `whole`: all are there, the block at a multiple of kCount floats.
template <int kCount>
__device__ __forceinline__ void LoadValues(float (&to)[kCount], const float* block, int first,
                                           int height, bool whole) {
  if (whole) return Load<kCount>(to, block + first);
#pragma unroll
  for (int v = 0; v < kCount; ++v) to[v] = first + v < height ? __ldg(block + first + v) : 0.0f;
}

// The row that a warp computes: by falling length where `order` says so, so that the longest start
// first and the warps of a thread block end together.
__device__ __forceinline__ int RowAt(const int32_t* order, int slot) {
  return order != nullptr ? __ldg(order + slot) : slot;
}

}  // namespace sk::cuda
