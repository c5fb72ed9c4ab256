// Stands in for csrc/cuda/mma_intrinsics.cuh: TF32 products on the emulator, by layouts that are
// data (mma_layouts.h).
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/mma_layouts.h"

namespace sk::cuda {

constexpr uint32_t kTf32Rest = 0x1fff;  // the bits of a float32 that TF32 does not have

inline uint32_t RoundToTf32(uint32_t bits) {
  if ((bits & 0x7f800000) == 0x7f800000)  // NaN and infinity
    return (bits & 0x7fffff) != 0 ? 0x7fffe000 : bits;
  return (bits + (kTf32Rest + 1) / 2) & ~kTf32Rest;
}

inline void ResolveMultiplyTf32(void* const* operands, uint32_t) {
  float a[16 * 8], b[8 * 8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments<float>*>(operands[lane]);
    for (int i = 0; i < 4; ++i)
      std::memcpy(&a[emulation::kTf32A.Place(lane, i)], &f.a[i], sizeof(float));
    for (int i = 0; i < 2; ++i)
      std::memcpy(&b[emulation::kTf32B.Place(lane, i)], &f.b[i], sizeof(float));
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& f = *static_cast<Fragments<float>*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int place = emulation::kTf32C.Place(lane, i), m = place % 16, n = place / 16;
      for (int k = 0; k < 8; ++k) f.d[i] += a[m + 16 * k] * b[n + 8 * k];
    }
  }
}

template <>
inline void MultiplyAccumulate<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      emulation::Place place) {
  Fragments<float> f;
  for (const uint32_t word : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if ((word & kTf32Rest) != 0)
      emulation::Fault("mma.sync: operand %08x was not rounded to TF32", word);
  std::memcpy(f.d, d, sizeof d);
  std::memcpy(f.a, a, sizeof a);
  std::memcpy(f.b, b, sizeof b);
  emulation::WarpMeet("mma.sync", 0xffffffffu, ResolveMultiplyTf32, &f, place);
  for (int i = 0; i < 4; ++i) d[i] = f.d[i];
}

}  // namespace sk::cuda
