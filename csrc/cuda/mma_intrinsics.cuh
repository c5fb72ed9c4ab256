// TF32 on the tensor cores. The tests' host emulation replaces this header too
// (tests/cuda_emulation/include/cuda/mma_intrinsics.cuh).
#pragma once

#include "cuda/intrinsics.cuh"

namespace sk::cuda {

// The bits of a float32, rounded to TF32: nearest, ties away from zero. mma.sync takes operands
// whose lower 13 bits are zero; what it does with others is not specified.
__device__ __forceinline__ uint32_t RoundToTf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// d += a b in TF32 (PTX ISA, "mma.sync.aligned.m16n8k8"): a 16 x 8 (row), b 8 x 8 (col).
template <>
__device__ __forceinline__ void MultiplyAccumulate<float>(float (&d)[4], const uint32_t (&a)[4],
                                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sk::cuda
