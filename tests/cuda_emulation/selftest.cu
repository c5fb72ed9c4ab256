// Small kernels for the tests of the emulator itself: each primitive used rightly, and each fault
// that it must find.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/check.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"

namespace py = pybind11;
namespace {

using namespace sk::cuda;

enum Fault : int {
  kNone,
  kBarrierSkipped,    // half of the block returns before a barrier
  kBarrierDivergent,  // two barriers, one for each half
  kBarrierDropped,
  kSharedPastEnd,
  kSharedUnwritten,
  kGlobalPastEnd,
  kGlobalBefore,
  kWriteToInput,
  kMisaligned,
  kWaitDropped,         // the copy is read while under way
  kWaitUnpaired,        // a wait with nothing committed
  kCopyAbandoned,       // the kernel ends with a copy under way
  kCopyBarrierDropped,  // waited for, but read by another thread with no barrier
  kWrongLane,           // a shuffle from a lane outside the mask
  kShuffleDiverged,     // half of the warp does not shuffle
  kIndexNull,
  kShuffleForSync,  // lanes meet, but nothing orders their memory
};

// Each block of 64 threads reverses its 64 floats of x into y by shared memory.
__global__ void Reverse(float* y, const float* x, int fault) {
  auto* tile = reinterpret_cast<float*>(DynamicShared());
  const int i = threadIdx.x, at = blockIdx.x * 64;
  tile[fault == kSharedPastEnd ? i + 1 : i] = x[at + i + (fault == kGlobalPastEnd)];
  if (fault == kGlobalBefore && at == 0) tile[i] = x[i - 1];
  if (fault == kBarrierSkipped && i >= 32) return;
  if (fault == kBarrierDivergent && i < 32)
    __syncthreads();
  else if (fault != kBarrierDropped)
    __syncthreads();
  if (fault == kWriteToInput) const_cast<float*>(x)[at + i] = 0;
  if (fault == kMisaligned && i == 0)
    *reinterpret_cast<float2*>(y + at + 1) = *reinterpret_cast<const float2*>(x + at);
  y[at + i] = tile[63 - i];
}

// As Reverse, but the tile comes by cp.async, four floats a copy.
__global__ void ReverseCopied(float* y, const float* x, int fault) {
  auto* tile = reinterpret_cast<float*>(DynamicShared());
  const int i = threadIdx.x, at = blockIdx.x * 64;
  if (i < 16 && fault != kWaitUnpaired) {
    CopyAsync<16>(tile + 4 * i, x + at + 4 * i, 16);
    if (fault != kCopyAbandoned) CommitCopies();
    if (fault != kWaitDropped && fault != kCopyAbandoned) WaitCopies<0>();
  }
  if (fault == kWaitUnpaired) WaitCopies<0>();
  if (fault != kCopyBarrierDropped) __syncthreads();
  if (fault != kCopyAbandoned) y[at + i] = tile[63 - i];
}

// y[i] = sum of x over the warp, by shuffles.
__global__ void WarpSum(float* y, const float* x, int fault) {
  const int i = threadIdx.x;
  float sum = x[blockIdx.x * 64 + i];
  const unsigned mask = fault == kWrongLane ? (i % 32 < 16 ? 0xffffu : 0xffff0000u) : 0xffffffffu;
  for (int step = 16; step > 0; step /= 2) {
    if (fault == kShuffleDiverged && i % 32 >= 16) continue;
    sum += __shfl_xor_sync(mask, sum, step);
  }
  y[blockIdx.x * 64 + i] = sum;
}

// Each warp reverses its 32 floats by shared memory.
__global__ void WarpReverse(float* y, const float* x, int fault) {
  auto& tile = StaticShared<float[64]>();
  const int i = threadIdx.x, at = blockIdx.x * 64;
  tile[i] = x[at + i];
  if (fault == kShuffleForSync)
    (void)__shfl_xor_sync(0xffffffffu, i, 1);
  else
    __syncwarp();
  y[at + i] = tile[i ^ 31];
}

__global__ void SharedUnwritten(float* y, const float* x, int) {
  auto& tile = StaticShared<float[64]>();
  if (threadIdx.x != 7) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void ReadNull(float* y, const float* x, int fault) {
  const float* nothing = fault == kIndexNull ? nullptr : x;
  y[threadIdx.x] = nothing[threadIdx.x];
}

// y[0] counts the positive x; y[1 + warp] is that warp's ballot of them.
__global__ void Votes(int* y, const float* x, int) {
  const bool positive = x[blockIdx.x * 64 + threadIdx.x] > 0.0f;
  const unsigned votes = __ballot_sync(0xffffffffu, positive);
  if (positive) atomicAdd(y, 1);
  if (threadIdx.x % 32 == 0) y[1 + blockIdx.x * 2 + threadIdx.x / 32] = static_cast<int>(votes);
}

// One mma; where the fragments' elements are comes from tables: [32][8], [32][4] and [32][4]
// offsets into a [16][16], b [16][8] (k, n) and d [16][8].
template <typename T>
__global__ void Mma(float* d, const T* a, const T* b, const int* at_a, const int* at_b,
                    const int* at_d) {
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[2];
  float fd[4] = {};
  for (int i = 0; i < 4; ++i) {
    T pair[2] = {a[at_a[lane * 8 + 2 * i]], a[at_a[lane * 8 + 2 * i + 1]]};
    fa[i] = *reinterpret_cast<uint16_t*>(pair) | *reinterpret_cast<uint16_t*>(pair + 1) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    T pair[2] = {b[at_b[lane * 4 + 2 * i]], b[at_b[lane * 4 + 2 * i + 1]]};
    fb[i] = *reinterpret_cast<uint16_t*>(pair) | *reinterpret_cast<uint16_t*>(pair + 1) << 16;
  }
  MultiplyAccumulate<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[at_d[lane * 4 + i]] = fd[i];
}

struct MatrixTile {
  alignas(16) uint16_t elements[256];
};

// x: four 8 x 8 matrices of 16 bits; y [32][4] the words that the lanes get.
template <bool kTransposed>
__global__ void Matrices(uint32_t* y, const uint16_t* x) {
  auto& tile = StaticShared<MatrixTile>().elements;
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t words[4];
  LoadMatrices<kTransposed>(words, tile + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = words[i];
}

using Address = std::uintptr_t;

void Run(const std::string& name, Address y, Address x, int blocks, int fault) {
  const auto what = [&name] { return "selftest " + name; };
  auto* out = reinterpret_cast<float*>(y);
  const auto* in = reinterpret_cast<const float*>(x);
  const LaunchShape shape = {dim3(blocks), dim3(64), 64 * sizeof(float), nullptr};
  if (name == "reverse") Launch(what, Reverse, shape, out, in, fault);
  if (name == "reverse_copied") Launch(what, ReverseCopied, shape, out, in, fault);
  if (name == "warp_sum") Launch(what, WarpSum, shape, out, in, fault);
  if (name == "warp_reverse") Launch(what, WarpReverse, shape, out, in, fault);
  if (name == "shared_unwritten") Launch(what, SharedUnwritten, shape, out, in, fault);
  if (name == "read_null") Launch(what, ReadNull, shape, out, in, fault);
  if (name == "votes") Launch(what, Votes, shape, reinterpret_cast<int*>(y), in, fault);
}

// A launcher that puts y = x reversed twice, by way of `between`, on `stream`; `how` it goes wrong.
void RunPlaced(const std::string& how, Address y, Address between, Address x, int device,
               Address stream) {
  const auto what = [&how] { return "selftest placed, " + how; };
  const DeviceGuard guard(how == "device ignored" ? 0 : device, what);
  void* place = reinterpret_cast<void*>(stream);
  if (how == "allocates") {
    void* memory = nullptr;
    Check(cudaMalloc(&memory, 256), "cudaMalloc", what);
    Check(cudaFree(memory), "cudaFree", what);
  }
  const LaunchShape shape = {dim3(1), dim3(64), 64 * sizeof(float), place};
  LaunchShape second = shape;
  if (how == "default stream") second.stream = nullptr;
  Launch(what, Reverse, shape, reinterpret_cast<float*>(between), reinterpret_cast<const float*>(x),
         0);
  if (how == "waits")
    Check(cudaStreamSynchronize(static_cast<cudaStream_t>(place)), "cudaStreamSynchronize", what);
  Launch(what, Reverse, second, reinterpret_cast<float*>(y),
         reinterpret_cast<const float*>(between), 0);
}

// Of the driver's own: zeros into y, then a copy of x to its second half.
void RunMoves(Address y, Address x, size_t bytes, Address stream) {
  const auto what = [] { return std::string("selftest moves"); };
  auto* to = reinterpret_cast<char*>(y);
  auto* place = reinterpret_cast<cudaStream_t>(stream);
  Check(cudaMemsetAsync(to, 0, bytes, place), "cudaMemsetAsync", what);
  Check(cudaMemcpyAsync(to + bytes / 2, reinterpret_cast<const void*>(x), bytes / 2,
                        cudaMemcpyDefault, place),
        "cudaMemcpyAsync", what);
}

template <typename T>
void RunMma(Address d, Address a, Address b, Address at_a, Address at_b, Address at_d) {
  Launch([] { return std::string("selftest mma"); }, Mma<T>, {dim3(1), dim3(32), 0, nullptr},
         reinterpret_cast<float*>(d), reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(b),
         reinterpret_cast<const int*>(at_a), reinterpret_cast<const int*>(at_b),
         reinterpret_cast<const int*>(at_d));
}

void RunMatrices(Address y, Address x, bool transposed) {
  Launch([] { return std::string("selftest ldmatrix"); },
         transposed ? Matrices<true> : Matrices<false>, {dim3(1), dim3(32), 0, nullptr},
         reinterpret_cast<uint32_t*>(y), reinterpret_cast<const uint16_t*>(x));
}

}  // namespace

void bind_selftest(py::module_& m) {
  m.def("run", &Run);
  m.def("run_placed", &RunPlaced);
  m.def("run_moves", &RunMoves);
  m.def("run_mma_half", &RunMma<__half>);
  m.def("run_mma_bfloat16", &RunMma<__nv_bfloat16>);
  m.def("run_matrices", &RunMatrices);
  py::dict faults;
  const char* names[] = {"none",
                         "barrier_skipped",
                         "barrier_divergent",
                         "barrier_dropped",
                         "shared_past_end",
                         "shared_unwritten",
                         "global_past_end",
                         "global_before",
                         "write_to_input",
                         "misaligned",
                         "wait_dropped",
                         "wait_unpaired",
                         "copy_abandoned",
                         "copy_barrier_dropped",
                         "wrong_lane",
                         "shuffle_diverged",
                         "index_null",
                         "shuffle_for_sync"};
  for (int i = 0; i <= kShuffleForSync; ++i) faults[names[i]] = i;
  m.attr("faults") = faults;
}
