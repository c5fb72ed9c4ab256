// Loads and stores of several activations at once, as float32.
#pragma once

#include "cuda/intrinsics.cuh"

namespace sk::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type that moves kWidth elements of kBytes in one instruction; its alignment is required.
template <int kBytes, int kWidth>
struct PackOf;
template <>
struct PackOf<4, 1> {
  using Type = float;
};
template <>
struct PackOf<4, 2> {
  using Type = float2;
};
template <>
struct PackOf<4, 4> {
  using Type = float4;
};
template <>
struct PackOf<2, 1> {
  using Type = unsigned short;
};
template <>
struct PackOf<2, 2> {
  using Type = ushort2;
};
template <>
struct PackOf<2, 4> {
  using Type = ushort4;
};

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void FromFloat(float& to, float from) { to = from; }
__device__ __forceinline__ void FromFloat(__half& to, float from) { to = __float2half_rn(from); }
__device__ __forceinline__ void FromFloat(__nv_bfloat16& to, float from) {
  to = __float2bfloat16_rn(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void Unpack(float (&to)[kWidth],
                                       const typename PackOf<sizeof(T), kWidth>::Type& pack) {
  const T* elements = reinterpret_cast<const T*>(&pack);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = ToFloat(elements[i]);
}

// From shared memory, which __ldg must not read.
template <int kWidth, typename T>
__device__ __forceinline__ void LoadShared(float (&to)[kWidth], const T* from) {
  using Pack = typename PackOf<sizeof(T), kWidth>::Type;
  const Pack pack = *reinterpret_cast<const Pack*>(from);
  Unpack<kWidth, T>(to, pack);
}

// From global memory that no thread of the kernel writes.
template <int kWidth, typename T>
__device__ __forceinline__ void Load(float (&to)[kWidth], const T* from) {
  using Pack = typename PackOf<sizeof(T), kWidth>::Type;
  const Pack pack = __ldg(reinterpret_cast<const Pack*>(from));
  Unpack<kWidth, T>(to, pack);
}

template <int kWidth, typename T>
__device__ __forceinline__ void Store(T* to, const float (&from)[kWidth]) {
  using Pack = typename PackOf<sizeof(T), kWidth>::Type;
  union Out {
    Pack pack;
    T elements[kWidth];
    __device__ Out() {}
  } out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) FromFloat(out.elements[i], from[i]);
  *reinterpret_cast<Pack*>(to) = out.pack;
}

}  // namespace sk::cuda
