// Stand-in for CUDA's header of this name: half as storage, conversions rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h.bits, sizeof value);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float f) {
  const _Float16 value = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h.bits, &value, sizeof value);
  return h;
}
