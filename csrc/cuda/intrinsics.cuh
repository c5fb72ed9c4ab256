// The special instructions, one function each, and launches. The tests' host emulation replaces
// this header (tests/cuda_emulation/include/cuda/intrinsics.cuh) and nothing else of csrc/cuda.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sk::cuda {

// The block's dynamic shared memory, 128-byte aligned.
__device__ __forceinline__ unsigned char* DynamicShared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// Static shared memory of the block. `Tag` tells two of the same type in one kernel apart.
template <typename T, typename Tag = T>
__device__ __forceinline__ T& StaticShared() {
  __shared__ T object;
  return object;
}

// -- cp.async (PTX ISA, "cp.async") --------------------------------------------------------------

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of kBytes (4, 8 or 16) to shared memory: `source_bytes` from `global`, then zeros.
// Both addresses are aligned to kBytes. `global` is not read where source_bytes is 0.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global, int source_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(SharedAddress(shared)),
                 "l"(global), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
}

// Closes a group: the copies that this thread started since the last one.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kGroups of this thread's groups are under way. Other threads see the bytes
// after a barrier only.
template <int kGroups>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// -- tensor cores (PTX ISA, "ldmatrix", "mma.sync.aligned.m16n8k16") -----------------------------

// Four 8 x 8 matrices of 16-bit elements; lane i passes the address of row i % 8 of matrix i / 8.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], const void* shared_row) {
  const uint32_t row = SharedAddress(shared_row);
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  }
}

// d += a b: a 16 x 16 (row), b 16 x 8 (col), d 16 x 8 in float32; T __half or __nv_bfloat16.
template <typename T>
__device__ __forceinline__ void MultiplyAccumulate(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void MultiplyAccumulate<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                           const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void MultiplyAccumulate<__nv_bfloat16>(float (&d)[4],
                                                                  const uint32_t (&a)[4],
                                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sk::cuda
