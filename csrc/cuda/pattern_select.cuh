// Exact selection and compaction, layer by layer and tile by tile.
//
// Selection is a radix select (most significant digit first): each pass counts one digit of the
// scores that agree with the digits found so far and so finds the next digit of the count-th best.
// Then every tile counts what is better than that score and what is equal to it; the sums before
// each tile (cub::DeviceScan) say where its chosen ones go and which equals are still wanted, which
// is what makes ties go to the lowest index. Atomics are on integers only.
#pragma once

#include "cuda/pattern.cuh"

namespace sk::cuda {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kWarpItems = 512, kSelectTile = kWarpItems * kPatternWarps;
constexpr unsigned kEveryLane = 0xffffffffu;

// Numbers that order like the scores, larger ones first to be chosen. Adding 0 makes +0 of -0.
__device__ __forceinline__ uint32_t OrderOf(float score, bool largest) {
  const float plain = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &plain, sizeof bits);
  bits = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return largest ? bits : ~bits;
}
__device__ __forceinline__ uint64_t OrderOf(double score, bool largest) {
  const double plain = score + 0.0;
  uint64_t bits;
  memcpy(&bits, &plain, sizeof bits);
  bits = (bits >> 63) != 0 ? ~bits : bits | (uint64_t(1) << 63);
  return largest ? bits : ~bits;
}

// How far the selection of a layer is.
struct SelectState {
  uint64_t prefix;     // the digits found, of the order number of the count-th best
  uint32_t remaining;  // how many are to be chosen among those that begin with them
};

// A digit of the order numbers. `first`: no digit has been found before.
struct Digit {
  int shift, bits;
  bool first, largest;
};

struct Bins {
  unsigned count[kBins];
};
struct WarpSums {
  unsigned sure[kPatternWarps], tied[kPatternWarps];
};

// Adds a digit (-1: none) per lane. Scores of one magnitude fall into one bin: a leader adds for
// all lanes that have its digit.
__device__ __forceinline__ void CountDigit(unsigned* bins, int digit, int lane) {
  const unsigned present = __ballot_sync(kEveryLane, digit >= 0);
  if (present == 0) return;
  const int leader = __ffs(static_cast<int>(present)) - 1;
  const int common = __shfl_sync(kEveryLane, digit, leader);
  const unsigned same = __ballot_sync(kEveryLane, digit == common);
  if (lane == leader) {
    atomicAdd(&bins[common], static_cast<unsigned>(__popc(same)));
  } else if (digit >= 0 && digit != common) {
    atomicAdd(&bins[digit], 1u);
  }
}

template <typename T>
__global__ void __launch_bounds__(kPatternThreads)
    CountDigitsKernel(const Placed<SelectLayer>* layers, int layer_count, const SelectState* states,
                      Digit digit, unsigned* histogram) {
  unsigned* bins = StaticShared<Bins>().count;
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
  const int number = LayerOf(layers, layer_count, tile);
  const Placed<SelectLayer>& placed = layers[number];
  const T* scores = static_cast<const T*>(placed.layer.scores);
  const int size = static_cast<int>(placed.layer.size);
  const int begin = (tile - static_cast<int>(placed.first_tile)) * kSelectTile;
  for (int bin = thread; bin < kBins; bin += kPatternThreads) bins[bin] = 0;
  __syncthreads();
  const int above = digit.shift + digit.bits;
  const uint64_t found = digit.first ? 0 : states[number].prefix >> above;
  for (int i = begin + thread; i < begin + kSelectTile; i += kPatternThreads) {
    int bin = -1;
    if (i < size) {
      const uint64_t order = OrderOf(scores[i], digit.largest);
      if (digit.first || order >> above == found)
        bin = static_cast<int>(order >> digit.shift) & ((1 << digit.bits) - 1);
    }
    CountDigit(bins, bin, thread % 32);
  }
  __syncthreads();
  for (int bin = thread; bin < kBins; bin += kPatternThreads)
    if (bins[bin] != 0) atomicAdd(&histogram[number * kBins + bin], bins[bin]);
}

// A block per layer: finds the digit in which the wanted number is reached, counting from the
// largest, and clears the layer's bins for the next pass.
template <typename Layer>
__global__ void __launch_bounds__(kPatternThreads)
    FindDigitKernel(const Placed<Layer>* layers, SelectState* states, Digit digit,
                    unsigned* histogram) {
  constexpr int kPerThread = kBins / kPatternThreads;
  unsigned* warp_sums = StaticShared<WarpSums>().sure;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int number = static_cast<int>(blockIdx.x);
  unsigned* bins = histogram + number * kBins;
  const uint64_t prefix = digit.first ? 0 : states[number].prefix;
  const unsigned wanted =
      digit.first ? static_cast<unsigned>(layers[number].layer.count) : states[number].remaining;
  unsigned counts[kPerThread], sum = 0;
  for (int i = 0; i < kPerThread; ++i) {
    const int bin = kBins - 1 - (thread * kPerThread + i);
    counts[i] = bins[bin];
    bins[bin] = 0;
    sum += counts[i];
  }
  unsigned upto = sum;  // of this lane and those before it
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(kEveryLane, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) warp_sums[warp] = upto;
  __syncthreads();  // also: every thread has read the state before one writes it
  unsigned before = upto - sum;
  for (int i = 0; i < warp; ++i) before += warp_sums[i];
  for (int i = 0; i < kPerThread; ++i) {
    if (before < wanted && wanted - before <= counts[i]) {
      const uint64_t bin = static_cast<uint64_t>(kBins - 1 - (thread * kPerThread + i));
      states[number] = {prefix | bin << digit.shift, wanted - before};
    }
    before += counts[i];
  }
  // Nothing wanted: above all numbers, where nothing is.
  if (thread == 0 && wanted == 0)
    states[number] = {prefix | ((uint64_t(1) << digit.bits) - 1) << digit.shift, 0};
}

// -- tiles: what is chosen in front of them ------------------------------------------------------

enum class Rank { kOut, kTied, kSure };

// The scores of a layer against the count-th best.
template <typename T>
class ScoresOf {
 public:
  using Layer = SelectLayer;
  __device__ ScoresOf(const SelectLayer& layer, const SelectState* states, int number, bool largest)
      : layer_(layer),
        bound_(states[number].prefix),
        ties_(states[number].remaining),
        largest_(largest) {}
  __device__ int size() const { return static_cast<int>(layer_.size); }
  __device__ unsigned ties() const { return ties_; }
  __device__ Rank RankOf(int i) const {
    const uint64_t order = OrderOf(static_cast<const T*>(layer_.scores)[i], largest_);
    return order > bound_ ? Rank::kSure : order == bound_ ? Rank::kTied : Rank::kOut;
  }
  __device__ void Write(int i, bool chosen, unsigned place) const {
    if (layer_.mask != nullptr) layer_.mask[i] = chosen ? 1 : 0;
    if (chosen && layer_.places != nullptr) layer_.places[place] = i;
  }

 private:
  SelectLayer layer_;
  uint64_t bound_;
  unsigned ties_;
  bool largest_;
};

// The blocks of a layer that are not pruned.
template <typename T>
class KeptOf {
 public:
  using Layer = KeepLayer;
  __device__ KeptOf(const KeepLayer& layer, const SelectState*, int, bool) : layer_(layer) {}
  __device__ int size() const { return static_cast<int>(layer_.size); }
  __device__ unsigned ties() const { return 0; }
  __device__ Rank RankOf(int i) const { return layer_.pruned[i] == 0 ? Rank::kSure : Rank::kOut; }
  __device__ void Write(int i, bool chosen, unsigned place) const {
    if (!chosen || place >= static_cast<unsigned>(layer_.count)) return;
    const int64_t key = layer_.keys[i];
    layer_.kept[place] = key;
    if (layer_.scores != nullptr) static_cast<T*>(layer_.scores)[key] = T(-1);
  }

 private:
  KeepLayer layer_;
};

// Sure and tied items of two counters in one word: a layer end to end has fewer than 2^32 of each.
__device__ __forceinline__ uint64_t Packed(unsigned sure, unsigned tied) {
  return uint64_t(sure) << 32 | tied;
}

// What the lanes of a warp have at its 512 items.
template <typename Source>
__device__ __forceinline__ uint64_t CountItems(const Source& source, int begin, int lane) {
  unsigned sure = 0, tied = 0;
  for (int i = begin + lane; i < begin + kWarpItems; i += 32) {
    const Rank rank = i < source.size() ? source.RankOf(i) : Rank::kOut;
    sure += static_cast<unsigned>(__popc(__ballot_sync(kEveryLane, rank == Rank::kSure)));
    tied += static_cast<unsigned>(__popc(__ballot_sync(kEveryLane, rank == Rank::kTied)));
  }
  return Packed(sure, tied);
}

template <typename Source>
__global__ void __launch_bounds__(kPatternThreads)
    CountTilesKernel(const Placed<typename Source::Layer>* layers, int layer_count,
                     const SelectState* states, bool largest, uint64_t* tile_counts) {
  WarpSums& sums = StaticShared<WarpSums>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x), number = LayerOf(layers, layer_count, tile);
  const Source source(layers[number].layer, states, number, largest);
  const int begin = (tile - static_cast<int>(layers[number].first_tile)) * kSelectTile;
  const uint64_t count = CountItems(source, begin + warp * kWarpItems, thread % 32);
  if (thread % 32 == 0) {
    sums.sure[warp] = static_cast<unsigned>(count >> 32);
    sums.tied[warp] = static_cast<unsigned>(count);
  }
  __syncthreads();
  if (thread != 0) return;
  uint64_t total = 0;
  for (int i = 0; i < kPatternWarps; ++i) total += Packed(sums.sure[i], sums.tied[i]);
  tile_counts[tile] = total;
}

template <typename Source>
__global__ void __launch_bounds__(kPatternThreads)
    WriteTilesKernel(const Placed<typename Source::Layer>* layers, int layer_count,
                     const SelectState* states, bool largest, const uint64_t* tiles_before) {
  WarpSums& sums = StaticShared<WarpSums>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x), number = LayerOf(layers, layer_count, tile);
  const Source source(layers[number].layer, states, number, largest);
  const int first = static_cast<int>(layers[number].first_tile);
  const int begin = (tile - first) * kSelectTile + warp * kWarpItems;
  const uint64_t count = CountItems(source, begin, lane);
  if (lane == 0) {
    sums.sure[warp] = static_cast<unsigned>(count >> 32);
    sums.tied[warp] = static_cast<unsigned>(count);
  }
  __syncthreads();
  const uint64_t before = tiles_before[tile] - tiles_before[first];
  unsigned sure = static_cast<unsigned>(before >> 32), tied = static_cast<unsigned>(before);
  for (int i = 0; i < warp; ++i) {
    sure += sums.sure[i];
    tied += sums.tied[i];
  }
  const unsigned lower = (1u << lane) - 1, ties = source.ties();
  for (int i = begin + lane; i < begin + kWarpItems; i += 32) {
    const Rank rank = i < source.size() ? source.RankOf(i) : Rank::kOut;
    const unsigned sures = __ballot_sync(kEveryLane, rank == Rank::kSure);
    const unsigned equals = __ballot_sync(kEveryLane, rank == Rank::kTied);
    const unsigned my_sure = sure + static_cast<unsigned>(__popc(sures & lower));
    const unsigned my_tied = tied + static_cast<unsigned>(__popc(equals & lower));
    const bool chosen = rank == Rank::kSure || (rank == Rank::kTied && my_tied < ties);
    if (i < source.size()) source.Write(i, chosen, my_sure + (my_tied < ties ? my_tied : ties));
    sure += static_cast<unsigned>(__popc(sures));
    tied += static_cast<unsigned>(__popc(equals));
  }
}

}  // namespace sk::cuda
