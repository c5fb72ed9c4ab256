// What tests ask of streams and graphs beside the CUDA runtime's own functions (streams.cpp).
#pragma once

#include <cstddef>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulation {

// One call of the runtime that gave work to a stream, waited or allocated.
struct Done {
  const char* what;
  int device;
  cudaStream_t stream;
};

cudaStream_t NewStream(int device);
cudaEvent_t NewEvent();
void SetQueueing(bool on);  // from now on work waits for a synchronisation
void DropWork();            // forgets what is queued
std::vector<Done> TakeDone();

// Between the two, work of `stream` goes into a graph instead of being done. EndCapture throws
// std::runtime_error where a call was made that a capture forbids.
void BeginCapture(cudaStream_t stream);
size_t EndCapture();
cudaError_t Replay(size_t graph);

}  // namespace emulation
