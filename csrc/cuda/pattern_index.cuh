// The index arrays of a pattern from its keys, and one key list from two.
//
// The transposed order of all layers is one stable radix sort (cub::DeviceRadixSort) of the entries
// by block column, counted through all layers. Pointers are binary searches: no atomics.
#pragma once

#include "cuda/pattern.cuh"

namespace sk::cuda {

constexpr int kIndexTile = 4 * kPatternThreads;

// Items of a layer that each thread of a tile visits: `f(i)` for i of the tile below `items`.
template <typename Visit>
__device__ __forceinline__ void ForItems(int64_t first_tile, int items, Visit f) {
  const int begin = (static_cast<int>(blockIdx.x) - static_cast<int>(first_tile)) * kIndexTile;
  const int end = min(items, begin + kIndexTile);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kPatternThreads) f(i);
}

__device__ __forceinline__ int Longest(int64_t a, int64_t b) { return static_cast<int>(max(a, b)); }

// crow and col of every layer, zeros past the entries, and what is to be sorted.
__global__ void __launch_bounds__(kPatternThreads)
    SplitKeysKernel(const Placed<IndexLayer>* layers, int layer_count, uint32_t* columns,
                    int32_t* positions) {
  const Placed<IndexLayer>& placed =
      layers[LayerOf(layers, layer_count, static_cast<int>(blockIdx.x))];
  const IndexLayer layer = placed.layer;
  const int count = static_cast<int>(layer.count);
  ForItems(placed.first_tile, Longest(layer.capacity, layer.block_rows + 1), [&](int i) {
    if (i < count) {
      const int64_t key = layer.keys[i];
      const int64_t column = key - key / layer.block_cols * layer.block_cols;
      layer.col[i] = static_cast<int32_t>(column);
      columns[placed.first_entry + i] = static_cast<uint32_t>(placed.first_column + column);
      positions[placed.first_entry + i] = i;
    } else if (i < layer.capacity) {
      layer.col[i] = 0;
    }
    if (i <= layer.block_rows)
      layer.crow[i] = LowerBound(layer.keys, count, int64_t{i} * layer.block_cols);
  });
}

// The transposed arrays, from the sorted columns and the positions that came with them.
__global__ void __launch_bounds__(kPatternThreads)
    TransposeKernel(const Placed<IndexLayer>* layers, int layer_count, const uint32_t* columns,
                    const int32_t* positions) {
  const Placed<IndexLayer>& placed =
      layers[LayerOf(layers, layer_count, static_cast<int>(blockIdx.x))];
  const IndexLayer layer = placed.layer;
  const int count = static_cast<int>(layer.count);
  ForItems(placed.first_tile, Longest(layer.capacity, layer.block_cols + 1), [&](int i) {
    if (i < count) {
      const int32_t position = positions[placed.first_entry + i];
      layer.t_perm[i] = position;
      layer.t_row[i] = static_cast<int32_t>(layer.keys[position] / layer.block_cols);
    } else if (i < layer.capacity) {
      layer.t_perm[i] = 0;
      layer.t_row[i] = 0;
    }
    if (i <= layer.block_cols)
      layer.t_crow[i] = LowerBound(columns + placed.first_entry, count,
                                   static_cast<uint32_t>(placed.first_column + i));
  });
}

// A key's place among both lists: its own index and the number of smaller keys in the other list.
__global__ void __launch_bounds__(kPatternThreads)
    MergeKeysKernel(const Placed<MergeLayer>* layers, int layer_count) {
  const Placed<MergeLayer>& placed =
      layers[LayerOf(layers, layer_count, static_cast<int>(blockIdx.x))];
  const MergeLayer layer = placed.layer;
  const int kept = static_cast<int>(layer.kept_count), grown = static_cast<int>(layer.grown_count);
  ForItems(placed.first_tile, kept + grown, [&](int i) {
    const bool stays = i < kept;
    const int mine = stays ? i : i - kept;
    const int64_t key = stays ? layer.kept[mine] : layer.grown[mine];
    // A key of both lists (which may not be) would come after its twin, not in its place.
    const int others =
        stays ? LowerBound(layer.grown, grown, key) : LowerBound(layer.kept, kept, key + 1);
    layer.keys[mine + others] = key;
  });
}

// Where each new key stands in the old list; -1 where it does not.
__global__ void __launch_bounds__(kPatternThreads)
    LocateKernel(const Placed<LocateLayer>* layers, int layer_count) {
  const Placed<LocateLayer>& placed =
      layers[LayerOf(layers, layer_count, static_cast<int>(blockIdx.x))];
  const LocateLayer layer = placed.layer;
  const int old_count = static_cast<int>(layer.old_count);
  ForItems(placed.first_tile, static_cast<int>(layer.new_count), [&](int i) {
    const int64_t key = layer.new_keys[i];
    const int at = LowerBound(layer.old_keys, old_count, key);
    layer.source[i] = at < old_count && layer.old_keys[at] == key ? at : -1;
  });
}

}  // namespace sk::cuda
