// When and how the dense kernels write past the cache.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

// Outputs above this are written past the cache: what reads them next comes too late for it, and a
// plain store would read every line first.
constexpr int64_t kStreamBytes = int64_t(12) << 20;

template <bool kStream>
SK_INLINE void Put(float* p, Vec a) {
  if (kStream) {
    vstream(p, a);
  } else {
    vstore(p, a);
  }
}

// Whether rows of `count` floats from `p` on may and should be written with Put<true>.
SK_INLINE bool Streams(const float* p, int64_t rows, int64_t count) {
  return rows * count * 4 > kStreamBytes && count % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p) % kVecBytes == 0;
}

}  // namespace SK_ISA
}  // namespace sk
