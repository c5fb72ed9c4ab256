// The launchers merge_keys, build_index and locate_blocks.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/pattern_index.cuh"

namespace sk::cuda {

namespace {

bool Fits(int64_t count) { return count >= 0 && count <= kMostItems; }

template <typename Layer, typename Items>
PatternCall Describe(const char* name, const std::vector<Layer>& layers, const Place& place,
                     Items items) {
  PatternCall what = {name, static_cast<int64_t>(layers.size()), 0, "keys", place.device};
  for (const Layer& layer : layers) what.items += items(layer);
  return what;
}

// Queues a kernel that needs nothing but the layers.
template <typename Layer, typename Items>
int64_t RunLayers(const PatternCall& what, void (*kernel)(const Placed<Layer>*, int),
                  const std::vector<Layer>& layers, const Scratch& scratch, const Place& place,
                  Items items) {
  if (layers.empty()) return 0;
  DeviceGuard guard(place.device, what);
  int64_t tiles = 0;
  const auto placed = PlaceLayers(layers, kIndexTile, items, &tiles);
  Parts parts(scratch.memory);
  auto* there = parts.Take<Placed<Layer>>(what.layers);
  if (!HasWorkspace(what, scratch, parts.used())) return parts.used();
  PutLayers(what, placed, there, place.stream);
  LaunchTiles(what, kernel, tiles, place.stream, there, static_cast<int>(what.layers));
  return parts.used();
}

int BitsOf(int64_t most) {
  int bits = 1;
  while (bits < 32 && most >> bits != 0) ++bits;
  return bits;
}

// The sort's two sides and what CUB wants beside them.
struct SortParts {
  uint32_t *columns, *sorted_columns;
  int32_t *positions, *sorted_positions;
  size_t bytes = 0;
  unsigned char* memory;
  int entries, bits;

  SortParts(const PatternCall& what, Parts& parts, int64_t entry_count, int64_t column_count)
      : entries(static_cast<int>(entry_count)), bits(BitsOf(column_count)) {
    columns = parts.Take<uint32_t>(entry_count);
    sorted_columns = parts.Take<uint32_t>(entry_count);
    positions = parts.Take<int32_t>(entry_count);
    sorted_positions = parts.Take<int32_t>(entry_count);
    if (entries > 0) Sort(what, nullptr, bytes, nullptr);
    memory = parts.Take<unsigned char>(static_cast<int64_t>(bytes));
  }
  void Sort(const PatternCall& what, void* temporary, size_t& size, void* stream) {
    Check(cub::DeviceRadixSort::SortPairs(temporary, size, static_cast<const uint32_t*>(columns),
                                          sorted_columns, static_cast<const int32_t*>(positions),
                                          sorted_positions, entries, 0, bits,
                                          static_cast<cudaStream_t>(stream)),
          "cub::DeviceRadixSort::SortPairs", what);
  }
};

void ServeIndex(const PatternCall& what, const std::vector<IndexLayer>& layers) {
  int64_t columns = 0;
  for (const IndexLayer& layer : layers) {
    ServePattern(
        Fits(layer.capacity) && layer.count >= 0 && layer.count <= layer.capacity, what,
        "a count from 0 to the capacity, and a capacity below 2^31 - 2^16, in every layer");
    ServePattern(Fits(layer.block_rows) && Fits(layer.block_cols) && layer.block_cols > 0, what,
                 "0 to 2^31 - 2^16 - 1 block rows and 1 to so many block columns in every layer");
    ServePattern(layer.crow != nullptr && layer.t_crow != nullptr, what,
                 "row and column pointers that are not null");
    columns += layer.block_cols;
  }
  ServePattern(columns < UINT32_MAX, what, "fewer than 2^32 - 1 block columns in all layers");
  ServePattern(what.items <= kMostItems, what, "fewer than 2^31 - 2^16 keys in all layers");
}

}  // namespace

int64_t merge_keys(const std::vector<MergeLayer>& layers, const Scratch& scratch,
                   const Place& place) {
  const auto items = [](const MergeLayer& layer) { return layer.kept_count + layer.grown_count; };
  const PatternCall what = Describe("merge_keys", layers, place, items);
  for (const MergeLayer& layer : layers)
    ServePattern(Fits(layer.kept_count) && Fits(layer.grown_count) && Fits(items(layer)), what,
                 "0 to 2^31 - 2^16 - 1 keys in every layer");
  return RunLayers(what, &MergeKeysKernel, layers, scratch, place, items);
}

int64_t locate_blocks(const std::vector<LocateLayer>& layers, const Scratch& scratch,
                      const Place& place) {
  const auto items = [](const LocateLayer& layer) { return layer.new_count; };
  const PatternCall what = Describe("locate_blocks", layers, place, items);
  for (const LocateLayer& layer : layers)
    ServePattern(Fits(layer.old_count) && Fits(layer.new_count), what,
                 "0 to 2^31 - 2^16 - 1 keys in every layer");
  return RunLayers(what, &LocateKernel, layers, scratch, place, items);
}

int64_t build_index(const std::vector<IndexLayer>& layers, const Scratch& scratch,
                    const Place& place) {
  const PatternCall what =
      Describe("build_index", layers, place, [](const IndexLayer& layer) { return layer.count; });
  ServeIndex(what, layers);
  if (layers.empty()) return 0;
  DeviceGuard guard(place.device, what);
  int64_t tiles = 0, entries = 0, columns = 0;
  auto placed = PlaceLayers(
      layers, kIndexTile,
      [](const IndexLayer& layer) {
        return std::max({layer.capacity, layer.block_rows + 1, layer.block_cols + 1});
      },
      &tiles);
  for (Placed<IndexLayer>& each : placed) {
    each.first_entry = entries;
    each.first_column = columns;
    entries += each.layer.count;
    columns += each.layer.block_cols;
  }
  Parts parts(scratch.memory);
  auto* there = parts.Take<Placed<IndexLayer>>(what.layers);
  SortParts sort(what, parts, entries, columns);
  if (!HasWorkspace(what, scratch, parts.used())) return parts.used();
  const int layer_count = static_cast<int>(what.layers);
  PutLayers(what, placed, there, place.stream);
  LaunchTiles(what, &SplitKeysKernel, tiles, place.stream, there, layer_count, sort.columns,
              sort.positions);
  if (entries > 0) sort.Sort(what, sort.memory, sort.bytes, place.stream);
  LaunchTiles(what, &TransposeKernel, tiles, place.stream, there, layer_count, sort.sorted_columns,
              sort.sorted_positions);
  return parts.used();
}

}  // namespace sk::cuda
