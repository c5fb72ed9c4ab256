// Kernel launches: shape, checked status, and leave to use more than 48 KB of shared memory.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "cuda/check.cuh"
#include "kernels_cuda.h"

namespace sk::cuda {

// Renders kernel and shape of a call for exceptions.
struct CallName {
  const char* name;
  const ConvGeometry& geometry;
  int64_t bh;
  Element element;
  int device;
  int64_t bw = 1;
  std::string operator()() const;  // launchers.cu
};

// Of every kernel of the products: blocks of 32 x 8 threads, a warp each for its own work.
constexpr int kWarpsPerBlock = 8;
// Blocks that shall fit on a multiprocessor, said for every kernel: left to itself, ptxas spills a
// few registers to fit one more.
constexpr int MinBlocks(int sums) { return sums <= 8 ? 4 : sums <= 32 ? 2 : 1; }

// What a kernel's second grid dimension holds at most; its blocks do several tiles each beyond
// that. The emulated tests ask for fewer (tests/cuda_emulation/emulation_build.py).
#ifndef SK_MAX_GRID_Y
#define SK_MAX_GRID_Y 65535
#endif

// A grid of `rows` of work, a thread block per `rows_per_block`, by `points`, a tile per
// `points_per_tile`.
inline dim3 Grid(int64_t rows, int64_t rows_per_block, int64_t points, int64_t points_per_tile) {
  const int64_t most = SK_MAX_GRID_Y;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const int64_t tiles = (points + points_per_tile - 1) / points_per_tile;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles < most ? tiles : most));
}

// What the launchers hand down: sizes checked, what() renders kernel and shape.
struct ProductShape {
  int block_rows, points;
  int width;        // points that batch and addresses allow to move at once: 4, 2 or 1
  bool wide_index;  // values and col are 16-byte aligned
};

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  void* stream;         // cudaStream_t
};

// Queues `kernel`; `what` renders kernel and shape for the exception (check.cuh).
template <typename Describe, typename... Parameters, typename... Arguments>
inline void Launch(Describe what, void (*kernel)(Parameters...), const LaunchShape& shape,
                   Arguments&&... arguments) {
  // 48 KB are free, the static part included, which the launcher does not know: 8 KB at most.
  constexpr size_t kWithoutAsking = 40 << 10;
  if (shape.shared_bytes > kWithoutAsking)
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", what);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  Check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch", what);
}

}  // namespace sk::cuda
