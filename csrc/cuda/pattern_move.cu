// The launcher move_blocks: tensors of blocks into a new order, in place.
//
// Block i of the new order may come from before or after place i, so the new content is gathered
// into the workspace first and spread from there.
#include "cuda/pattern.cuh"

namespace sk::cuda {

namespace {

constexpr int kMoveTile = 8 * kPatternThreads;

// `first_entry`: where the tensor's content begins in the workspace, in units.
template <typename Unit>
__global__ void __launch_bounds__(kPatternThreads)
    GatherBlocksKernel(const Placed<MoveTensor>* tensors, int tensor_count, Unit* staged) {
  const int tile = static_cast<int>(blockIdx.x);
  const Placed<MoveTensor>& placed = tensors[LayerOf(tensors, tensor_count, tile)];
  const MoveTensor& tensor = placed.layer;
  const int64_t units = tensor.block_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t begin = (tile - placed.first_tile) * kMoveTile;
  const int64_t end = min(tensor.count * units, begin + kMoveTile);
  const auto* from = static_cast<const Unit*>(tensor.from);
  const auto* start = static_cast<const Unit*>(tensor.start);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPatternThreads) {
    const int64_t block = i / units;
    const int64_t source = tensor.source[block];
    Unit content = 0;
    if (source >= 0) {
      content = from[source * units + (i - block * units)];
    } else if (start != nullptr) {
      content = start[i];
    }
    staged[placed.first_entry + i] = content;
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kPatternThreads)
    SpreadBlocksKernel(const Placed<MoveTensor>* tensors, int tensor_count, const Unit* staged) {
  const int tile = static_cast<int>(blockIdx.x);
  const Placed<MoveTensor>& placed = tensors[LayerOf(tensors, tensor_count, tile)];
  const MoveTensor& tensor = placed.layer;
  const int64_t units = tensor.block_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t filled = tensor.count * units;
  const int64_t begin = (tile - placed.first_tile) * kMoveTile;
  const int64_t end = min(tensor.capacity * units, begin + kMoveTile);
  auto* to = static_cast<Unit*>(tensor.to);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPatternThreads)
    to[i] = i < filled ? staged[placed.first_entry + i] : Unit(0);
}

bool Aligned(const MoveTensor& tensor, uintptr_t to) {
  return (reinterpret_cast<uintptr_t>(tensor.from) | reinterpret_cast<uintptr_t>(tensor.to) |
          reinterpret_cast<uintptr_t>(tensor.start)) %
             to ==
         0;
}

PatternCall Describe(const std::vector<MoveTensor>& tensors, const Place& place) {
  PatternCall what = {"move_blocks", static_cast<int64_t>(tensors.size()), 0, "blocks",
                      place.device};
  for (const MoveTensor& tensor : tensors) what.items += tensor.count;
  for (const MoveTensor& tensor : tensors) {
    ServePattern(
        tensor.capacity <= kMostItems && tensor.count >= 0 && tensor.count <= tensor.capacity, what,
        "a count from 0 to the capacity of every tensor");
    ServePattern(tensor.block_bytes > 0 && tensor.block_bytes <= 1 << 20 &&
                     tensor.block_bytes % 2 == 0 &&
                     Aligned(tensor, tensor.block_bytes % 4 == 0 ? 4 : 2),
                 what,
                 "blocks of 2 bytes to 1 MB in multiples of 2, aligned to 4 bytes where they are "
                 "multiples of 4, else to 2");
    ServePattern((tensor.from != nullptr && tensor.source != nullptr) || tensor.count == 0, what,
                 "old blocks and sources that are not null");
    ServePattern(tensor.to != nullptr || tensor.capacity == 0, what, "a target that is not null");
  }
  return what;
}

// Those tensors whose blocks are moved in units of this type; returns the bytes of workspace.
template <typename Unit>
int64_t Move(const PatternCall& what, const std::vector<MoveTensor>& tensors, Parts& parts,
             bool run, void* stream) {
  constexpr int64_t kBytes = sizeof(Unit);
  int64_t tiles = 0, units = 0;
  auto placed = PlaceLayers(
      tensors, kMoveTile,
      [](const MoveTensor& tensor) { return tensor.capacity * (tensor.block_bytes / kBytes); },
      &tiles);
  ServePattern(tiles <= INT32_MAX, what, "at most 2^31 - 1 tiles of 2048 units");
  for (Placed<MoveTensor>& each : placed) {
    each.first_entry = units;
    units += each.layer.count * (each.layer.block_bytes / kBytes);
  }
  auto* there = parts.Take<Placed<MoveTensor>>(static_cast<int64_t>(tensors.size()));
  auto* staged = parts.Take<Unit>(units);
  if (!run || tensors.empty()) return parts.used();
  const int tensor_count = static_cast<int>(tensors.size());
  PutLayers(what, placed, there, stream);
  LaunchTiles(what, &GatherBlocksKernel<Unit>, tiles, stream, there, tensor_count, staged);
  LaunchTiles(what, &SpreadBlocksKernel<Unit>, tiles, stream, there, tensor_count, staged);
  return parts.used();
}

}  // namespace

int64_t move_blocks(const std::vector<MoveTensor>& tensors, const Scratch& scratch,
                    const Place& place) {
  const PatternCall what = Describe(tensors, place);
  if (tensors.empty()) return 0;
  std::vector<MoveTensor> words, halves;
  for (const MoveTensor& tensor : tensors)
    (tensor.block_bytes % 4 == 0 ? words : halves).push_back(tensor);
  DeviceGuard guard(place.device, what);
  Parts sizes(nullptr);
  Move<uint32_t>(what, words, sizes, false, place.stream);
  Move<uint16_t>(what, halves, sizes, false, place.stream);
  if (!HasWorkspace(what, scratch, sizes.used())) return sizes.used();
  Parts parts(scratch.memory);
  Move<uint32_t>(what, words, parts, true, place.stream);
  return Move<uint16_t>(what, halves, parts, true, place.stream);
}

}  // namespace sk::cuda
