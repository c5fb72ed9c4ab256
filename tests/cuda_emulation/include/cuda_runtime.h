// Stand-in for CUDA's header of this name: qualifiers, vector types, warp and block primitives,
// launches.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// CUDA's alignments: an access through a pointer that lacks them is a fault on a GPU.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) ushort2 {
  unsigned short x, y;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
inline T __ldg(const T* from) {
  emulation::RequireGlobal(from);
  return *from;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

namespace emulation {

// A value that every lane brings, the lane it wants, and what it gets.
template <typename T>
struct Exchange {
  T value;
  int source;
  T result;
};

template <typename T>
void ResolveExchange(void* const* operands, uint32_t mask) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = static_cast<Exchange<T>*>(operands[lane]);
    // The hardware hands out garbage of a lane that is not there; here it is a fault.
    if (!(mask >> mine->source & 1))
      Fault("shuffle: lane %d reads lane %d, which is not in the mask %08x", lane, mine->source,
            mask);
    mine->result = static_cast<Exchange<T>*>(operands[mine->source])->value;
  }
}

template <typename T>
T Shuffle(uint32_t mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Exchange<T> exchange{value, source, T()};
  WarpMeet("shuffle", mask, ResolveExchange<T>, &exchange, place);
  return exchange.result;
}

inline void ResolveBallot(void* const* operands, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((mask >> lane & 1) && *static_cast<uint32_t*>(operands[lane]) != 0) votes |= 1u << lane;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) *static_cast<uint32_t*>(operands[lane]) = votes;
}

inline uint32_t Ballot(uint32_t mask, bool vote, Place place) {
  uint32_t operand = vote;
  WarpMeet("vote", mask, ResolveBallot, &operand, place);
  return operand;
}

// Lane that a shuffle of `width` reads: segments of the warp are worlds of their own.
inline int InSegment(int lane, int source, int width) { return (lane & ~(width - 1)) + source; }

}  // namespace emulation

#define EMULATION_HERE emulation::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(EMULATION_HERE) { emulation::BlockBarrier(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) {
  emulation::WarpMeet("__syncwarp", mask, emulation::ResolveNothing, &mask, place);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
  const int lane = emulation::LaneId();
  return emulation::Shuffle(mask, value, emulation::InSegment(lane, source & (width - 1), width),
                            place);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
  const int lane = emulation::LaneId(), source = lane ^ bits;
  const bool inside = source / width <= lane / width;
  return emulation::Shuffle(mask, value, inside ? source : lane, place);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, int step, int width = 32, EMULATION_HERE) {
  const int lane = emulation::LaneId(), source = lane + step;
  return emulation::Shuffle(mask, value, source / width == lane / width ? source : lane, place);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int step, int width = 32, EMULATION_HERE) {
  const int lane = emulation::LaneId(), inside = lane % width - step >= 0;
  return emulation::Shuffle(mask, value, inside ? lane - step : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, EMULATION_HERE) {
  return emulation::Ballot(mask, vote != 0, place);
}
inline int __any_sync(unsigned mask, int vote, EMULATION_HERE) {
  return emulation::Ballot(mask, vote != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, EMULATION_HERE) {
  return emulation::Ballot(mask, vote != 0, place) == mask;
}

// Fibers switch only where they wait, so an atomic is a plain read, change and write.
#define EMULATION_ATOMIC(NAME, T, CHANGE)                                       \
  __attribute__((no_sanitize("thread"))) inline T NAME(T* address, T operand) { \
    emulation::CheckAccess(address, sizeof(T), emulation::Kind::kAtomic);       \
    const T before = *address;                                                  \
    *address = CHANGE;                                                          \
    return before;                                                              \
  }
EMULATION_ATOMIC(atomicAdd, int, before + operand)
EMULATION_ATOMIC(atomicAdd, unsigned, before + operand)
EMULATION_ATOMIC(atomicAdd, float, before + operand)
EMULATION_ATOMIC(atomicMax, int, before < operand ? operand : before)
EMULATION_ATOMIC(atomicMin, int, before < operand ? before : operand)
EMULATION_ATOMIC(atomicOr, unsigned, before | operand)
EMULATION_ATOMIC(atomicExch, int, operand)
#undef EMULATION_ATOMIC

namespace emulation {
cudaError_t CheckLaunch(const void* kernel, const cudaLaunchConfig_t& config);
size_t SharedRoom(const void* kernel);  // for static and dynamic parts together
cudaError_t FinishLaunch(bool fine);
cudaError_t AllowShared(const void* kernel, int bytes);
}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const cudaError_t status = emulation::CheckLaunch(reinterpret_cast<const void*>(kernel), *config);
  if (status != cudaSuccess) return status;
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t shared = config->dynamicSmemBytes;
  const size_t room = emulation::SharedRoom(reinterpret_cast<const void*>(kernel));
  return emulation::Submit("launch", config->stream, [=] {
    emulation::shared_room = room;
    return emulation::RunGrid(grid, block, shared, [&] {
      const auto call = [kernel](Parameters... p) {
        emulation::watching = true;
        kernel(p...);
        emulation::watching = false;
      };
      std::apply(call, parameters);
    });
  });
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {};
  return emulation::compiled ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return emulation::AllowShared(reinterpret_cast<const void*>(kernel), value);
}
