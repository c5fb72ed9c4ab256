// Sums of feature-major channels: the gradient of a bias. Bound by memory, so it is called while
// what it reads may still be in the last-level cache (behind the weight gradient).
#include "../kernels_dense.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {
namespace {

// Sums of so many floats are taken in float, and added up in double.
constexpr int64_t kChunk = 4096;
// Below this many floats a parallel region costs more than the sums.
constexpr int64_t kParallel = 1 << 15;

float ChunkSum(const float* src, int64_t count) {
  Vec acc[8];
  SK_UNROLL for (int k = 0; k < 8; ++k) acc[k] = vzero();
  int64_t i = 0;
  for (; i + 8 * kLanes <= count; i += 8 * kLanes) {
    SK_UNROLL for (int k = 0; k < 8; ++k) acc[k] = vadd(acc[k], vload(src + i + k * kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) acc[0] = vadd(acc[0], vload(src + i));
  SK_UNROLL for (int k = 0; k < 4; ++k) acc[k] = vadd(acc[k], acc[k + 4]);
  float sum = vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
  for (; i < count; ++i) sum += src[i];
  return sum;
}

float RowSum(const float* src, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i += kChunk) sum += ChunkSum(src + i, imin(kChunk, count - i));
  return float(sum);
}

}  // namespace

void channel_sums(const ChannelSumsArgs& args) {
  const bool parallel = args.channels * args.count > kParallel;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (parallel)
  for (int64_t c = 0; c < args.channels; ++c)
    args.sums[c] = RowSum(args.src + c * args.count, args.count);
}

}  // namespace SK_ISA
}  // namespace sk
