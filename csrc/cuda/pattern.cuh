// What the kernels of a pattern change share: layers laid end to end in tiles, their descriptions
// on the GPU, the parts of the workspace.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "kernels_cuda_pattern.h"

namespace sk::cuda {

constexpr int kPatternThreads = 256, kPatternWarps = kPatternThreads / 32;
constexpr int64_t kMostItems = INT32_MAX - (1 << 16);  // so that an int can pass the last tile

// A layer's description and what lies before it in the row of all layers.
template <typename Layer>
struct Placed {
  Layer layer;
  int64_t first_tile;
  int64_t first_entry;   // of a list of all layers' entries
  int64_t first_column;  // of a list of all layers' block columns
};

// The layer that `tile` belongs to: the last that begins no later (empty ones begin with the next).
template <typename Layer>
__device__ __forceinline__ int LayerOf(const Placed<Layer>* layers, int count, int tile) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (layers[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first place of sorted [count] whose entry is not below `wanted`.
template <typename T>
__device__ __forceinline__ int LowerBound(const T* sorted, int count, T wanted) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (sorted[low + half] < wanted) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// -- host ----------------------------------------------------------------------------------------

// Renders a call for exceptions.
struct PatternCall {
  const char* name;
  int64_t layers, items;
  const char* unit;
  int device;
  std::string operator()() const {
    return std::string(name) + " (layers " + std::to_string(layers) + ", " + unit + " " +
           std::to_string(items) + ", device " + std::to_string(device) + ")";
  }
};

inline void ServePattern(bool condition, const PatternCall& what, const char* expected) {
  if (!condition) throw std::invalid_argument(what() + ": expected " + expected);
}

// Cuts the workspace into parts; without memory it only adds up.
class Parts {
 public:
  explicit Parts(void* memory) : begin_(static_cast<unsigned char*>(memory)) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + used_);
    constexpr int64_t kAlign = 256;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* begin_;
  int64_t used_ = 0;
};

// True where the call is to run, false where it only asks for the size.
inline bool HasWorkspace(const PatternCall& what, const Scratch& scratch, int64_t wanted) {
  if (scratch.memory == nullptr) return false;
  if (scratch.bytes < wanted)
    throw std::invalid_argument(
        what() + ": expected a workspace of at least " + std::to_string(wanted) + " bytes, got " +
        std::to_string(scratch.bytes) + "; ask for the size with the same layers");
  ServePattern(reinterpret_cast<uintptr_t>(scratch.memory) % 16 == 0, what,
               "a workspace aligned to 16 bytes");
  return true;
}

// Tiles of `per_tile` items that layer after layer takes; `items` gives those of one.
template <typename Layer, typename Items>
std::vector<Placed<Layer>> PlaceLayers(const std::vector<Layer>& layers, int per_tile, Items items,
                                       int64_t* tiles) {
  std::vector<Placed<Layer>> placed;
  placed.reserve(layers.size());
  *tiles = 0;
  for (const Layer& layer : layers) {
    placed.push_back({layer, *tiles, 0, 0});
    *tiles += (items(layer) + per_tile - 1) / per_tile;
  }
  return placed;
}

// Queues a kernel of kPatternThreads threads and one block per tile (or layer).
template <typename... Parameters, typename... Arguments>
void LaunchTiles(const PatternCall& what, void (*kernel)(Parameters...), int64_t blocks,
                 void* stream, Arguments&&... arguments) {
  if (blocks == 0) return;
  const LaunchShape shape = {dim3(static_cast<unsigned>(blocks)), dim3(kPatternThreads), 0, stream};
  Launch(what, kernel, shape, std::forward<Arguments>(arguments)...);
}

// Writes `bytes` (a multiple of 8) of host memory to the GPU, by kernel parameters.
void PutWords(const PatternCall& what, const void* from, int64_t bytes, void* to, void* stream);

template <typename Layer>
void PutLayers(const PatternCall& what, const std::vector<Placed<Layer>>& layers, Placed<Layer>* to,
               void* stream) {
  static_assert(sizeof(Placed<Layer>) % 8 == 0, "descriptions are made of words");
  PutWords(what, layers.data(), static_cast<int64_t>(layers.size() * sizeof(layers[0])), to,
           stream);
}

}  // namespace sk::cuda
