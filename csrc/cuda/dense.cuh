// What batch norm and pooling share: how a call is named, and how a channel is spread over threads.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "kernels_cuda_dense.h"

namespace sk::cuda {

constexpr int kDenseThreads = 256;
// Room above every int that a kernel forms of an element of a channel.
constexpr int64_t kMaxElements = INT32_MAX - 4 * kDenseThreads;

// Renders kernel and shape of a call for exceptions.
struct DenseCall {
  const char* name;
  int64_t channels, count;  // elements per channel
  Element element;
  int device;
  std::string operator()() const {
    const char* types[] = {"float32", "float16", "bfloat16"};
    return std::string(name) + " (channels " + std::to_string(channels) + ", elements each " +
           std::to_string(count) + ", " + types[static_cast<int>(element)] + ", device " +
           std::to_string(device) + ")";
  }
};

inline void ServeDense(const DenseCall& what) {
  if (what.count <= kMaxElements && what.channels <= INT32_MAX) return;
  throw std::invalid_argument(what() +
                              ": expected fewer than 2^31 channels and 2^31 - 1024 elements each");
}

// Calls `run` with a value of the element's type.
template <typename Run>
void ForType(Element element, Run run) {
  if (element == Element::kFloat32) return run(float());
  if (element == Element::kFloat16) return run(__half());
  run(__nv_bfloat16());
}

// Whether rows of `row` elements at these addresses can be moved four at a time.
template <typename... Pointers>
bool Wide(Element element, int64_t row, Pointers... pointers) {
  const uintptr_t addresses = (reinterpret_cast<uintptr_t>(pointers) | ...);
  return row % 4 == 0 && addresses % (element == Element::kFloat32 ? 16 : 8) == 0;
}

// A thread block per channel and per 4 rounds of its threads over the channel's elements.
inline LaunchShape DenseShape(int64_t channels, int64_t count, int width, void* stream) {
  const int64_t per_block = int64_t(kDenseThreads) * width * 4;
  return {Grid(channels, 1, count < 1 ? 1 : count, per_block), dim3(kDenseThreads), 0, stream};
}

// Of a kernel with that shape: this thread's first element of its channel, and the next one's
// distance.
template <int kWidth>
__device__ __forceinline__ int64_t FirstElement() {
  return (static_cast<int64_t>(blockIdx.y) * kDenseThreads + threadIdx.x) * kWidth;
}
template <int kWidth>
__device__ __forceinline__ int64_t ElementStep() {
  return static_cast<int64_t>(gridDim.y) * kDenseThreads * kWidth;
}

// argmax of kWidth neighbours, in one access.
template <int kWidth>
__device__ __forceinline__ void LoadTaps(int (&taps)[kWidth], const uint8_t* from) {
  if constexpr (kWidth == 4) {
    const uint32_t packed = __ldg(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) taps[j] = static_cast<int>(packed >> (8 * j) & 255u);
  } else {
    taps[0] = __ldg(from);
  }
}
template <int kWidth>
__device__ __forceinline__ void StoreTaps(uint8_t* to, const int (&taps)[kWidth]) {
  if constexpr (kWidth == 4) {
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) packed |= static_cast<uint32_t>(taps[j]) << (8 * j);
    *reinterpret_cast<uint32_t*>(to) = packed;
  } else {
    to[0] = static_cast<uint8_t>(taps[0]);
  }
}

}  // namespace sk::cuda
