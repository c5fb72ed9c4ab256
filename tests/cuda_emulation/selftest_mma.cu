// Kernels for the tests of the emulator's tensor cores: one product in TF32, its layouts as
// numbers, and the faults of ldmatrix and mma.sync that it must find.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/mma_intrinsics.cuh"
#include "cuda/mma_layouts.h"

namespace py = pybind11;
namespace {

using namespace sk::cuda;
using Address = std::uintptr_t;

// One product; where the fragments' elements are comes from tables: [32][4], [32][2] and [32][4]
// offsets into a [16][8], b [8][8] (k, n) and d [16][8].
__global__ void MmaTf32(float* d, const float* a, const float* b, const int* at_a, const int* at_b,
                        const int* at_d) {
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[2];
  float fd[4] = {};
  for (int i = 0; i < 4; ++i) std::memcpy(&fa[i], a + at_a[lane * 4 + i], 4);
  for (int i = 0; i < 2; ++i) std::memcpy(&fb[i], b + at_b[lane * 2 + i], 4);
  for (int i = 0; i < 4; ++i) fa[i] = RoundToTf32(fa[i]);
  for (int i = 0; i < 2; ++i) fb[i] = RoundToTf32(fb[i]);
  MultiplyAccumulate<float>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[at_d[lane * 4 + i]] = fd[i];
}

enum Fault : int {
  kNone,
  kMisaligned,    // a row of ldmatrix 8 bytes off
  kPastEnd,       // a row past the end of shared memory
  kNotShared,     // a row in global memory
  kUnfinished,    // a row that cp.async has not brought yet
  kNoBarrier,     // a row that another warp's copy brought, without a barrier
  kLaneMissing,   // one lane returns before the warp loads
  kMmaDivergent,  // half of the warp multiplies in another branch than the rest
  kNotRounded,    // a TF32 operand with all bits of a float32
};

// A block of two warps copies 256 floats and reads them by ldmatrix: 32 rows of 16 bytes each.
__global__ void LoadAndMultiply(float* y, const float* x, int fault) {
  unsigned char* tile = DynamicShared();
  const int thread = threadIdx.x, lane = thread % 32;
  CopyAsync<16>(tile + 16 * thread, x + 4 * thread, 16);
  CommitCopies();
  if (fault != kUnfinished) WaitCopies<0>();
  if (fault != kNoBarrier && fault != kUnfinished) __syncthreads();
  if (fault == kLaneMissing && lane == 5) return;
  const unsigned char* row = tile + (16 * thread ^ (fault == kNoBarrier ? 512 : 0));
  if (fault == kMisaligned && lane == 3) row += 8;
  if (fault == kPastEnd && thread == 63) row += 16;
  if (fault == kNotShared && lane == 7) row = reinterpret_cast<const unsigned char*>(x);
  uint32_t a[4];
  LoadMatrices<false>(a, row);
  if (fault == kUnfinished) WaitCopies<0>();
  uint32_t b[2] = {a[0], a[1]};
  for (uint32_t* word : {a, a + 1, a + 2, a + 3, b, b + 1})
    if (fault != kNotRounded) *word = RoundToTf32(*word);
  float d[4] = {};
  if (fault == kMmaDivergent && lane < 16)
    MultiplyAccumulate<__half>(d, a, b);
  else
    MultiplyAccumulate<float>(d, a, b);
  for (int i = 0; i < 4; ++i) y[4 * thread + i] = d[i];
}

void RunMmaTf32(Address d, Address a, Address b, Address at_a, Address at_b, Address at_d) {
  Launch([] { return std::string("selftest mma"); }, MmaTf32, {dim3(1), dim3(32), 0, nullptr},
         reinterpret_cast<float*>(d), reinterpret_cast<const float*>(a),
         reinterpret_cast<const float*>(b), reinterpret_cast<const int*>(at_a),
         reinterpret_cast<const int*>(at_b), reinterpret_cast<const int*>(at_d));
}

void RunFault(Address y, Address x, int fault) {
  Launch([] { return std::string("selftest mma"); }, LoadAndMultiply,
         {dim3(1), dim3(64), 1024, nullptr}, reinterpret_cast<float*>(y),
         reinterpret_cast<const float*>(x), fault);
}

// ((shape, stride) of the lane, (shape, stride) of the value), modes of one place left out.
py::tuple Numbers(const emulation::FragmentLayout& layout) {
  const auto mode = [](const emulation::FragmentMode& m) {
    const auto list = [&m](const int (&numbers)[2]) {
      return m.shape[1] == 1 ? py::tuple(py::make_tuple(numbers[0]))
                             : py::tuple(py::make_tuple(numbers[0], numbers[1]));
    };
    return py::make_tuple(list(m.shape), list(m.stride));
  };
  return py::make_tuple(mode(layout.lane), mode(layout.value));
}

}  // namespace

void bind_selftest_mma(py::module_& m) {
  m.def("run_mma_tf32", &RunMmaTf32);
  m.def("run_mma_fault", &RunFault);
  py::dict layouts;
  layouts["A"] = Numbers(emulation::kTf32A);
  layouts["B"] = Numbers(emulation::kTf32B);
  layouts["C"] = Numbers(emulation::kTf32C);
  m.attr("tf32_layouts") = layouts;
  py::list names;
  for (const char* name : {"none", "misaligned", "past_end", "not_shared", "unfinished",
                           "no_barrier", "lane_missing", "mma_divergent", "not_rounded"})
    names.append(name);
  m.attr("mma_faults") = names;
}
