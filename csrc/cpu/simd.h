// Vectors of float with one interface and a lane count fixed per instruction set: 4 (baseline), 8
// (AVX2+FMA), 16 (AVX-512).
//
// Included only by sources that are compiled once per instruction set with -DSK_ISA=<namespace>.
// Everything lives in that namespace, because an inline function of one name compiled with two sets
// of flags merges at link time, and an AVX-512 copy on an older CPU is an illegal instruction. For
// the same reason there is no std:: template here.
//
// SK_EMULATE_AVX512 (with AVX2 flags) gives 16 lanes from two AVX2 registers: the tile shapes and
// tails of the AVX-512 build can then be run, and held to the oracle, on a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef SK_ISA
#error "compile with -DSK_ISA=baseline, avx2, avx512 or avx512_emulated"
#endif

#define SK_INLINE static inline __attribute__((always_inline))

// Before a loop of a constant, small number of turns: unroll it completely, early enough that
// arrays of accumulators become registers.
#if defined(__clang__)
#define SK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace sk {
namespace SK_ISA {

#if defined(SK_EMULATE_AVX512)

constexpr int kLanes = 16;
constexpr int kAccumulators =
    16;  // what the AVX-512 build uses; two registers each here, so slow, but the same code
struct Vec {
  __m256 lo, hi;
};
SK_INLINE Vec vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SK_INLINE Vec vset1(const float* p) { return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p)}; }
SK_INLINE Vec vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SK_INLINE void vstore(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
SK_INLINE void vstream(float* p, Vec a) {
  _mm256_stream_ps(p, a.lo), _mm256_stream_ps(p + 8, a.hi);
}
SK_INLINE Vec vadd(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SK_INLINE Vec vfma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SK_INLINE Vec vrelu(Vec a) {
  return {_mm256_max_ps(_mm256_setzero_ps(), a.lo), _mm256_max_ps(_mm256_setzero_ps(), a.hi)};
}

#elif defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kAccumulators = 16;
using Vec = __m512;
SK_INLINE Vec vzero() { return _mm512_setzero_ps(); }
SK_INLINE Vec vset1(const float* p) { return _mm512_set1_ps(*p); }
SK_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
SK_INLINE void vstore(float* p, Vec a) { _mm512_storeu_ps(p, a); }
SK_INLINE void vstream(float* p, Vec a) { _mm512_stream_ps(p, a); }
SK_INLINE Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SK_INLINE Vec vrelu(Vec a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kLanes = 8;
constexpr int kAccumulators =
    8;  // 8 hide the latency of two FMA units; 16 registers leave no room for 16
using Vec = __m256;
SK_INLINE Vec vzero() { return _mm256_setzero_ps(); }
SK_INLINE Vec vset1(const float* p) { return _mm256_broadcast_ss(p); }
SK_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
SK_INLINE void vstore(float* p, Vec a) { _mm256_storeu_ps(p, a); }
SK_INLINE void vstream(float* p, Vec a) { _mm256_stream_ps(p, a); }
SK_INLINE Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SK_INLINE Vec vrelu(Vec a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }

#else

// The compiler's own vectors: SSE2 on x86-64, NEON on aarch64, scalars elsewhere.
constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
typedef float Vec __attribute__((vector_size(16)));
SK_INLINE Vec vzero() { return Vec{0.f, 0.f, 0.f, 0.f}; }
SK_INLINE Vec vset1(const float* p) { return Vec{*p, *p, *p, *p}; }
SK_INLINE Vec vload(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
SK_INLINE void vstore(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
SK_INLINE Vec vadd(Vec a, Vec b) { return a + b; }
SK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
#if defined(__SSE2__)
SK_INLINE void vstream(float* p, Vec a) { _mm_stream_ps(p, (__m128)a); }
SK_INLINE Vec vrelu(Vec a) { return (Vec)_mm_max_ps(_mm_setzero_ps(), (__m128)a); }
#else
SK_INLINE void vstream(float* p, Vec a) { vstore(p, a); }
SK_INLINE Vec vrelu(Vec a) {  // "not less than" lets a NaN through, as torch's relu does
  for (int i = 0; i < 4; ++i) a[i] = a[i] < 0.f ? 0.f : a[i];
  return a;
}
#endif

#endif

// Max with zero as the first operand: x86 returns the second when either is NaN, so that NaN passes
// as in torch.

// Bytes of one vector: the alignment that vstream asks of its address.
constexpr int kVecBytes = kLanes * 4;

// Orders the streaming stores before whatever the thread does next (the end of a parallel region).
SK_INLINE void vfence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Sum of the lanes, always in the same order.
SK_INLINE float vsum(Vec a) {
#if defined(SK_EMULATE_AVX512) || (defined(__AVX2__) && defined(__FMA__))
#if defined(SK_EMULATE_AVX512)
  __m256 h = _mm256_add_ps(a.lo, a.hi);
#elif defined(__AVX512F__)
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
#else
  __m256 h = a;
#endif
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
#else
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

SK_INLINE void zero_floats(float* dst, int64_t n) {
  std::memset(dst, 0, size_t(n) * sizeof(float));
}

template <class T>
SK_INLINE T imin(T a, T b) {
  return a < b ? a : b;
}
template <class T>
SK_INLINE T imax(T a, T b) {
  return a > b ? a : b;
}
// First of the places [lo, hi) of a sorted array whose number is not below `key`.
SK_INLINE int64_t lower_bound(const int32_t* a, int64_t lo, int64_t hi, int64_t key) {
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    if (a[mid] < key) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}
SK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SK_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
SK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
SK_INLINE int pow2_floor(int64_t a) {
  int p = 1;
  while (2 * (int64_t)p <= a) p *= 2;
  return p;
}

// Arithmetic and masks of norm and pooling. vkeep_* return `a` in the lanes where the condition
// holds, else +0. vkeep_positive keeps a NaN condition too: torch's threshold_backward passes it.
// vwinner is a where the number is greater than `than` or NaN, else b: a maximum that lets NaN win.
// vload_bytes and vstore_bytes convert kLanes unsigned bytes to floats and back.
#if defined(SK_EMULATE_AVX512)

SK_INLINE Vec vsub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SK_INLINE Vec vmul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SK_INLINE __m256 vkeep_half(__m256 a, __m256 dropped) { return _mm256_andnot_ps(dropped, a); }
SK_INLINE Vec vkeep_positive(Vec a, Vec condition) {
  const __m256 zero = _mm256_setzero_ps();
  return {vkeep_half(a.lo, _mm256_cmp_ps(condition.lo, zero, _CMP_LE_OQ)),
          vkeep_half(a.hi, _mm256_cmp_ps(condition.hi, zero, _CMP_LE_OQ))};
}
SK_INLINE Vec vkeep_equal(Vec a, Vec left, Vec right) {
  return {vkeep_half(a.lo, _mm256_cmp_ps(left.lo, right.lo, _CMP_NEQ_UQ)),
          vkeep_half(a.hi, _mm256_cmp_ps(left.hi, right.hi, _CMP_NEQ_UQ))};
}
SK_INLINE __m256 vselect_half(__m256 number, __m256 than, __m256 a, __m256 b) {
  const __m256 wins = _mm256_or_ps(_mm256_cmp_ps(number, than, _CMP_GT_OQ),
                                   _mm256_cmp_ps(number, number, _CMP_UNORD_Q));
  return _mm256_blendv_ps(b, a, wins);
}
SK_INLINE Vec vwinner(Vec number, Vec than, Vec a, Vec b) {
  return {vselect_half(number.lo, than.lo, a.lo, b.lo),
          vselect_half(number.hi, than.hi, a.hi, b.hi)};
}
SK_INLINE void vstore_bytes(uint8_t* p, Vec a) {
  const __m256i words = _mm256_packus_epi32(_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi));
  const __m256i sorted = _mm256_permute4x64_epi64(words, 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(sorted),
                                                 _mm256_extracti128_si256(sorted, 1)));
}
SK_INLINE Vec vload_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

#elif defined(__AVX512F__)

SK_INLINE Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SK_INLINE Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SK_INLINE Vec vkeep_positive(Vec a, Vec condition) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_NLE_UQ), a);
}
SK_INLINE Vec vkeep_equal(Vec a, Vec left, Vec right) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, right, _CMP_EQ_OQ), a);
}
SK_INLINE Vec vwinner(Vec number, Vec than, Vec a, Vec b) {
  const __mmask16 wins = _mm512_cmp_ps_mask(number, than, _CMP_GT_OQ) |
                         _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b, wins, a);
}
SK_INLINE void vstore_bytes(uint8_t* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(_mm512_cvttps_epi32(a)));
}
SK_INLINE Vec vload_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

#elif defined(__AVX2__) && defined(__FMA__)

SK_INLINE Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SK_INLINE Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SK_INLINE Vec vkeep_positive(Vec a, Vec condition) {
  return _mm256_andnot_ps(_mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_LE_OQ), a);
}
SK_INLINE Vec vkeep_equal(Vec a, Vec left, Vec right) {
  return _mm256_and_ps(_mm256_cmp_ps(left, right, _CMP_EQ_OQ), a);
}
SK_INLINE Vec vwinner(Vec number, Vec than, Vec a, Vec b) {
  const __m256 wins = _mm256_or_ps(_mm256_cmp_ps(number, than, _CMP_GT_OQ),
                                   _mm256_cmp_ps(number, number, _CMP_UNORD_Q));
  return _mm256_blendv_ps(b, a, wins);
}
SK_INLINE void vstore_bytes(uint8_t* p, Vec a) {
  const __m256i numbers = _mm256_cvttps_epi32(a);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
SK_INLINE Vec vload_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#else

typedef int32_t IntVec __attribute__((vector_size(16)));
SK_INLINE Vec vsub(Vec a, Vec b) { return a - b; }
SK_INLINE Vec vmul(Vec a, Vec b) { return a * b; }
SK_INLINE Vec vkeep_positive(Vec a, Vec condition) {
  return (Vec)((IntVec)a & ~(IntVec)(condition <= vzero()));
}
SK_INLINE Vec vkeep_equal(Vec a, Vec left, Vec right) {
  return (Vec)((IntVec)a & (IntVec)(left == right));
}
SK_INLINE Vec vwinner(Vec number, Vec than, Vec a, Vec b) {
  const IntVec wins = (IntVec)(number > than) | (IntVec)(number != number);
  return (Vec)(((IntVec)a & wins) | ((IntVec)b & ~wins));
}
SK_INLINE void vstore_bytes(uint8_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = (uint8_t)a[i];
}
SK_INLINE Vec vload_bytes(const uint8_t* p) {
  return Vec{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
}

#endif

}  // namespace SK_ISA
}  // namespace sk
