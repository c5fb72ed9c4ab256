// Sums over the lanes of several accumulators at once.
//
// One vsum per accumulator is about as dear as five fused multiply-adds; eight accumulators
// transposed and added together cost little more than one.
#pragma once

#include "simd.h"

// Small loops over registers must be unrolled before the compiler looks at them: left as loops, GCC
// clears the accumulators in memory with `rep stos`, which costs more than a short dot product.
#if defined(__clang__)
#define SK_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define SK_UNROLL _Pragma("GCC unroll 32")
#else
#define SK_UNROLL
#endif

namespace sk {
namespace SK_ISA {

#if defined(SK_EMULATE_AVX512) || (defined(__AVX2__) && defined(__FMA__))

// 16 lanes folded to 8.
SK_INLINE __m256 fold8(Vec a) {
#if defined(SK_EMULATE_AVX512)
  return _mm256_add_ps(a.lo, a.hi);
#elif defined(__AVX512F__)
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
#else
  return a;
#endif
}

// The first n floats at p, zeros behind them; nothing past them is read. 0 < n < kLanes.
SK_INLINE Vec vload_part(const float* p, int64_t n) {
#if defined(__AVX512F__) && !defined(SK_EMULATE_AVX512)
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane);
#if defined(SK_EMULATE_AVX512)
  const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n) - 8), lane);
  return {_mm256_maskload_ps(p, low), _mm256_maskload_ps(p + 8, high)};
#else
  return _mm256_maskload_ps(p, low);
#endif
#endif
}

// Element i of either half: the sum of two elements of a (i even) or of b (i odd).
SK_INLINE __m256 add_interleaved(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}

// Lane i of the result: the sum of all lanes of v[i].
SK_INLINE __m256 sums8(const __m256 (&v)[8]) {
  const __m256 a = add_interleaved(v[0], v[2]), b = add_interleaved(v[1], v[3]);
  const __m256 c = add_interleaved(v[4], v[6]), d = add_interleaved(v[5], v[7]);
  const __m256 lo = add_interleaved(a, b), hi = add_interleaved(c, d);
  return _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31));
}

// to[i] += sum of acc[i].
template <int N>
SK_INLINE void add_sums(float* to, const Vec (&acc)[N]) {
  SK_UNROLL
  for (int base = 0; base < N; base += 8) {
    const int used = N - base < 8 ? N - base : 8;
    __m256 v[8];
    SK_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = i < used ? fold8(acc[base + i]) : _mm256_setzero_ps();
    const __m256 s = sums8(v);
    if (used == 8) {
      _mm256_storeu_ps(to + base, _mm256_add_ps(_mm256_loadu_ps(to + base), s));
    } else {  // nothing past the last sum may be touched: it can be another thread's
      float part[8];
      _mm256_storeu_ps(part, s);
      SK_UNROLL
      for (int i = 0; i < used; ++i) to[base + i] += part[i];
    }
  }
}

// to[i] = sum of acc[i].
template <int N>
SK_INLINE void lane_sums(float (&to)[N], const Vec (&acc)[N]) {
  static_assert(N <= 8, "one vector of sums");
  __m256 v[8];
  SK_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = i < N ? fold8(acc[i < N ? i : 0]) : _mm256_setzero_ps();
  const __m256 s = sums8(v);
  if constexpr (N == 8) {
    _mm256_storeu_ps(to, s);
  } else {
    float part[8];
    _mm256_storeu_ps(part, s);
    SK_UNROLL
    for (int i = 0; i < N; ++i) to[i] = part[i];
  }
}

#else

SK_INLINE Vec vload_part(const float* p, int64_t n) {
  float part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return vload(part);
}

template <int N>
SK_INLINE void add_sums(float* to, const Vec (&acc)[N]) {
  SK_UNROLL
  for (int i = 0; i < N; ++i) to[i] += vsum(acc[i]);
}

template <int N>
SK_INLINE void lane_sums(float (&to)[N], const Vec (&acc)[N]) {
  SK_UNROLL
  for (int i = 0; i < N; ++i) to[i] = vsum(acc[i]);
}

#endif

}  // namespace SK_ISA
}  // namespace sk
