// Element-sparse linear layer on a GPU (SpMM), feature-major activations.
#pragma once

#include <cstdint>

namespace sk::cuda {

// y[row][n] = relu?(sum over k in [crow[row], crow[row + 1]) of values[k] * x[col[k]][n] +
// bias[row])
//
// Every pointer but the stream is memory of GPU `device`, owned by the caller. Nothing is
// allocated, no scratch is used, and the work is queued on `stream` without waiting for it.
struct LinearArgs {
  float* y;             // [rows][batch], written
  const float* x;       // [cols][batch]
  const float* values;  // [capacity], only the first crow[rows] are read
  const float* bias;    // [rows] or null
  const int32_t* crow;  // [rows + 1]
  const int32_t* col;   // [capacity]
  int64_t rows;
  int64_t cols;
  int64_t batch;
  bool relu;
  int device;    // CUDA ordinal
  void* stream;  // cudaStream_t of `device`; null is the default stream
};

// Throws std::runtime_error with the kernel's name, the shape and CUDA's message when a CUDA call
// fails. The caller's current device is left as it was.
void linear(const LinearArgs& args);

}  // namespace sk::cuda
