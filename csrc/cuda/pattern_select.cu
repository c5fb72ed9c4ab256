// The launchers select_top_k and keep_blocks.
#include <cub/device/device_scan.cuh>

#include "cuda/pattern_select.cuh"

namespace sk::cuda {

namespace {

// The parts of a workspace that every compaction needs.
template <typename Layer>
struct TileParts {
  Placed<Layer>* layers;
  uint64_t *counts, *before;
  unsigned char* scan;
  size_t scan_bytes = 0;

  TileParts(const PatternCall& what, Parts& parts, size_t layer_count, int64_t tiles) {
    layers = parts.Take<Placed<Layer>>(static_cast<int64_t>(layer_count));
    counts = parts.Take<uint64_t>(tiles);
    before = parts.Take<uint64_t>(tiles);
    if (tiles > 0) Scan(what, nullptr, scan_bytes, tiles, nullptr);
    scan = parts.Take<unsigned char>(static_cast<int64_t>(scan_bytes));
  }
  void Scan(const PatternCall& what, void* memory, size_t& bytes, int64_t tiles, void* stream) {
    Check(cub::DeviceScan::ExclusiveSum(memory, bytes, counts, before, static_cast<int>(tiles),
                                        static_cast<cudaStream_t>(stream)),
          "cub::DeviceScan::ExclusiveSum", what);
  }
};

// Counts per tile, sums before each, and the results.
template <typename Source>
void WriteChosen(const PatternCall& what, TileParts<typename Source::Layer>& parts, int layer_count,
                 int64_t tiles, const SelectState* states, bool largest, void* stream) {
  if (tiles == 0) return;
  LaunchTiles(what, &CountTilesKernel<Source>, tiles, stream, parts.layers, layer_count, states,
              largest, parts.counts);
  parts.Scan(what, parts.scan, parts.scan_bytes, tiles, stream);
  LaunchTiles(what, &WriteTilesKernel<Source>, tiles, stream, parts.layers, layer_count, states,
              largest, parts.before);
}

template <typename T>
void FindBounds(const PatternCall& what, const Placed<SelectLayer>* layers, int layer_count,
                int64_t tiles, SelectState* states, unsigned* histogram, bool largest,
                void* stream) {
  const size_t bytes = static_cast<size_t>(layer_count) * kBins * sizeof(unsigned);
  Check(cudaMemsetAsync(histogram, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync",
        what);
  constexpr int kAllBits = 8 * sizeof(T);
  for (int left = kAllBits; left > 0;) {
    const int bits = std::min(left, kDigitBits);
    const Digit digit = {left - bits, bits, left == kAllBits, largest};
    LaunchTiles(what, &CountDigitsKernel<T>, tiles, stream, layers, layer_count, states, digit,
                histogram);
    LaunchTiles(what, &FindDigitKernel<SelectLayer>, layer_count, stream, layers, states, digit,
                histogram);
    left -= bits;
  }
}

template <typename Layer>
PatternCall Describe(const char* name, const std::vector<Layer>& layers, const Place& place) {
  int64_t items = 0;
  for (const Layer& layer : layers) items += layer.size;
  const PatternCall what = {name, static_cast<int64_t>(layers.size()), items, "items",
                            place.device};
  for (const Layer& layer : layers) {
    ServePattern(layer.size >= 0 && layer.size <= kMostItems, what,
                 "0 to 2^31 - 2^16 - 1 items in every layer");
    ServePattern(layer.count >= 0 && layer.count <= layer.size, what,
                 "a count from 0 to the number of items in every layer");
  }
  // Counters of all layers share a word: CountTilesKernel.
  ServePattern(items <= UINT32_MAX, what, "fewer than 2^32 items in all layers");
  return what;
}

}  // namespace

int64_t select_top_k(const std::vector<SelectLayer>& layers, bool largest, Score score,
                     const Scratch& scratch, const Place& place) {
  const PatternCall what = Describe("select_top_k", layers, place);
  for (const SelectLayer& layer : layers)
    ServePattern(layer.scores != nullptr || layer.size == 0, what, "scores that are not null");
  if (layers.empty()) return 0;
  DeviceGuard guard(place.device, what);
  int64_t tiles = 0;
  const auto placed =
      PlaceLayers(layers, kSelectTile, [](const SelectLayer& layer) { return layer.size; }, &tiles);
  Parts parts(scratch.memory);
  const int layer_count = static_cast<int>(layers.size());
  TileParts<SelectLayer> tile_parts(what, parts, layers.size(), tiles);
  auto* states = parts.Take<SelectState>(layer_count);
  auto* histogram = parts.Take<unsigned>(int64_t{layer_count} * kBins);
  if (!HasWorkspace(what, scratch, parts.used())) return parts.used();
  PutLayers(what, placed, tile_parts.layers, place.stream);
  const auto run = [&](auto number) {
    using T = decltype(number);
    FindBounds<T>(what, tile_parts.layers, layer_count, tiles, states, histogram, largest,
                  place.stream);
    WriteChosen<ScoresOf<T>>(what, tile_parts, layer_count, tiles, states, largest, place.stream);
  };
  if (score == Score::kFloat32) {
    run(float());
  } else {
    run(double());
  }
  return parts.used();
}

int64_t keep_blocks(const std::vector<KeepLayer>& layers, Score score, const Scratch& scratch,
                    const Place& place) {
  const PatternCall what = Describe("keep_blocks", layers, place);
  for (const KeepLayer& layer : layers) {
    ServePattern((layer.pruned != nullptr && layer.keys != nullptr) || layer.size == 0, what,
                 "a mask and keys that are not null");
    ServePattern(layer.kept != nullptr || layer.count == 0, what, "kept keys that are not null");
  }
  if (layers.empty()) return 0;
  DeviceGuard guard(place.device, what);
  int64_t tiles = 0;
  const auto placed =
      PlaceLayers(layers, kSelectTile, [](const KeepLayer& layer) { return layer.size; }, &tiles);
  Parts parts(scratch.memory);
  const int layer_count = static_cast<int>(layers.size());
  TileParts<KeepLayer> tile_parts(what, parts, layers.size(), tiles);
  if (!HasWorkspace(what, scratch, parts.used())) return parts.used();
  PutLayers(what, placed, tile_parts.layers, place.stream);
  if (score == Score::kFloat32) {
    WriteChosen<KeptOf<float>>(what, tile_parts, layer_count, tiles, nullptr, false, place.stream);
  } else {
    WriteChosen<KeptOf<double>>(what, tile_parts, layer_count, tiles, nullptr, false, place.stream);
  }
  return parts.used();
}

}  // namespace sk::cuda
