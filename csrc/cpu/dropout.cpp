// Dropout: y = x * noise, where noise is 0 or 1 / (1 - p), a function of (seed, position) alone.
//
// The generator is Philox4x32 with 7 rounds, the fewest that pass all of BigCrush (Salmon, Moraes,
// Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11): any word can be had at any
// time, so the backward pass draws the mask again, and neither threads nor instruction set matter.
#include <cstdint>
#include <cstring>

#include "kernels_dense.h"
#include "stream.h"

namespace sk {
namespace SK_ISA {
namespace {

// Counters live in lanes of 64 bits: a product of the low halves is then one instruction, and what
// stands in the high halves may be left there until the end.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef uint64_t Counters __attribute__((vector_size(kBytes)));
typedef int32_t Words __attribute__((vector_size(kBytes)));

SK_INLINE Counters MultiplyLow(Counters a, Counters b) {
#if defined(__AVX512F__)
  return (Counters)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Counters)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Counters)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

constexpr int kRounds = 7;
constexpr int kCounterLanes = kBytes / 8;
constexpr int kChains = 4;       // vectors of counters in flight: hide the products' latency
constexpr int64_t kBlock = 256;  // elements that 64 counters serve, 4 words each
constexpr int64_t kCounters = kBlock / 4;
constexpr int64_t kShare = 64 * kBlock;  // elements that a thread takes at a time
static_assert(kCounters % (kChains * kCounterLanes) == 0, "a block is whole turns of the loop");

struct Noise {
  uint32_t keys[kRounds][2];
  int32_t least;  // a word, read as signed, keeps its element if it is at least this
  int32_t scale;  // the bits of 1 / (1 - p)
};

// 1 / (1 - p) or 0 for the elements of one block: word h of counter c, h = 0, 1, is that of element
// 2 * c + h, word 2 + h that of element kBlock / 2 + 2 * c + h.
void FillNoise(float* out, const Noise& noise, int64_t block) {
  const uint64_t first = static_cast<uint64_t>(block) * kCounters;
  const Counters m0 = Counters{} + 0xD2511F53u, m1 = Counters{} + 0xCD9E8D57u;
  const Counters low = Counters{} + 0xffffffffu;
  Counters lanes;
  for (int i = 0; i < kCounterLanes; ++i) lanes[i] = static_cast<uint64_t>(i);
  for (int64_t i = 0; i < kCounters; i += kChains * kCounterLanes) {
    Counters c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    SK_UNROLL for (int k = 0; k < kChains; ++k) {
      c0[k] = lanes + (first + static_cast<uint64_t>(i + k * kCounterLanes));
      c1[k] = Counters{} + (first >> 32);
      c2[k] = c3[k] = Counters{};
    }
    SK_UNROLL for (int round = 0; round < kRounds; ++round) {
      const uint64_t k0 = noise.keys[round][0], k1 = noise.keys[round][1];
      SK_UNROLL for (int k = 0; k < kChains; ++k) {
        const Counters a = MultiplyLow(c0[k], m0), b = MultiplyLow(c2[k], m1);
        c0[k] = (b >> 32) ^ (c1[k] ^ k0);
        c2[k] = (a >> 32) ^ (c3[k] ^ k1);
        c1[k] = b;
        c3[k] = a;
      }
    }
    SK_UNROLL for (int k = 0; k < kChains; ++k) {
      float* const at = out + 2 * (i + k * kCounterLanes);
      const Words front = (Words)((c0[k] & low) | (c1[k] << 32));
      const Words back = (Words)((c2[k] & low) | (c3[k] << 32));
      const Words kept_front = (Words)(front >= noise.least) & noise.scale;
      const Words kept_back = (Words)(back >= noise.least) & noise.scale;
      std::memcpy(at, &kept_front, kBytes);
      std::memcpy(at + kBlock / 2, &kept_back, kBytes);
    }
  }
}

// A product, not a selection: as in torch, NaN and infinity become NaN where they are dropped.
template <bool kStream>
void Multiply(float* y, const float* x, const float* noise, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Put<kStream>(y + i, vmul(vload(x + i), vload(noise + i)));
  for (; i < n; ++i) y[i] = x[i] * noise[i];
}

Noise MakeNoise(uint64_t seed, double p) {
  Noise noise;
  for (int round = 0; round < kRounds; ++round) {
    noise.keys[round][0] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * 0x9E3779B9u;
    noise.keys[round][1] =
        static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
  }
  constexpr double kSpan = 4294967296.0;
  const int64_t dropped = imin(static_cast<int64_t>(p * kSpan + 0.5), INT64_C(0xffffffff));
  noise.least = static_cast<int32_t>(dropped - (INT64_C(1) << 31));
  const float scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.f;
  std::memcpy(&noise.scale, &scale, sizeof(scale));
  return noise;
}

template <bool kStream>
void Share(const DropoutArgs& args, const Noise& noise, int64_t begin, int64_t end) {
  alignas(64) float factors[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    FillNoise(factors, noise, at / kBlock);
    Multiply<kStream>(args.y + at, args.x + at, factors, imin(kBlock, end - at));
  }
  if (kStream) vfence();
}

}  // namespace

void dropout(const DropoutArgs& args) {
  const Noise noise = MakeNoise(args.seed, args.p);
  const auto share = Streams(args.y, 1, args.count) ? Share<true> : Share<false>;
  const int threads = args.count > kShare ? args.threads : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t begin = 0; begin < args.count; begin += kShare) {
    share(args, noise, begin, imin(begin + kShare, args.count));
  }
}

}  // namespace SK_ISA
}  // namespace sk
