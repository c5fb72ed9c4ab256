// Stand-in for CUB's header of this name: the one entry point that csrc/cuda uses.
#pragma once

#include "../stand_in.h"

namespace cub {

struct DeviceScan {
  template <typename T>
  static cudaError_t ExclusiveSum(void* storage, size_t& bytes, const T* in, T* out, int items,
                                  cudaStream_t stream = nullptr) {
    const size_t length = static_cast<size_t>(items) * sizeof(T);
    const std::string problem = "cub::DeviceScan::ExclusiveSum of " + std::to_string(items) +
                                " items of " + std::to_string(sizeof(T)) + " bytes";
    return emulation::CubCall(problem, storage, bytes, 767 + length / 64,
                              {{"input", in, length, emulation::Kind::kRead},
                               {"output", out, length, emulation::Kind::kWrite}},
                              stream, [=] {
                                T sum = 0;
                                for (int i = 0; i < items; ++i) {
                                  out[i] = sum;
                                  sum += in[i];
                                }
                              });
  }
};

}  // namespace cub
