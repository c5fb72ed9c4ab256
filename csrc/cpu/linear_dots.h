// The inner kernel of a linear layer's weight gradient: R gradient rows against K source rows,
// R * K dot products over the batch at once.
#pragma once

#include "dot_sums.h"

namespace sk {
namespace SK_ISA {

// Dot products of one call: they hide the latency of the additions, and their sums over the lanes
// are taken together.
constexpr int kDots = 8;

template <int R, int K, class Load>
SK_INLINE void dots_step(Vec (&acc)[K * R], const float* const (&grad)[R],
                         const float* const (&x)[K], int64_t i, Load load) {
  Vec g[R];
  SK_UNROLL for (int r = 0; r < R; ++r) g[r] = load(grad[r] + i);
  SK_UNROLL for (int k = 0; k < K; ++k) {
    const Vec xk = load(x[k] + i);
    SK_UNROLL for (int r = 0; r < R; ++r) acc[k * R + r] = vfma(g[r], xk, acc[k * R + r]);
  }
}

// to[k * to_step + r] = dot(grad + r * batch, x + index[k] * batch). `ahead`: K more entries
// follow; the first lines of their rows are fetched, from where the processor finds the others by
// itself.
template <int R, int K>
SK_INLINE void dots(const float* grad, const float* x, const int32_t* index, int64_t batch,
                    float* to, int64_t to_step, bool ahead) {
  Vec acc[K * R];
  const float* gs[R];
  const float* xs[K];
  SK_UNROLL for (int i = 0; i < K * R; ++i) acc[i] = vzero();
  SK_UNROLL for (int r = 0; r < R; ++r) gs[r] = grad + r * batch;
  SK_UNROLL for (int k = 0; k < K; ++k) xs[k] = x + index[k] * batch;
  int64_t i = 0;
  if (ahead) {
    SK_UNROLL for (int k = 0; k < K; ++k) {
      __builtin_prefetch(x + index[K + k] * batch);
      __builtin_prefetch(x + index[K + k] * batch + 16);
    }
  }
  for (; i + kLanes <= batch; i += kLanes)
    dots_step<R, K>(acc, gs, xs, i, [](const float* p) { return vload(p); });
  if (i < batch) {
    const int64_t rest = batch - i;
    dots_step<R, K>(acc, gs, xs, i, [rest](const float* p) { return vload_part(p, rest); });
  }
  float sums[K * R];
  lane_sums(sums, acc);
  SK_UNROLL for (int k = 0; k < K; ++k) {
    SK_UNROLL for (int r = 0; r < R; ++r) to[k * to_step + r] = sums[k * R + r];
  }
}

// `count` entries, fewer than a full call takes.
template <int R, int K>
SK_INLINE void dots_rest(const float* grad, const float* x, const int32_t* index, int64_t batch,
                         float* to, int64_t to_step, int64_t count) {
  if constexpr (K > 0) {
    if (count == K) {
      dots<R, K>(grad, x, index, batch, to, to_step, false);
    } else {
      dots_rest<R, K - 1>(grad, x, index, batch, to, to_step, count);
    }
  }
}

// `count` entries of a line: values [entry][to_step], R of each.
template <int R>
void dots_kernel(const float* grad, const float* x, const int32_t* index, int64_t count,
                 int64_t batch, float* to, int64_t to_step) {
  constexpr int K = kDots / R;
  for (; count >= K; count -= K, index += K, to += K * to_step)
    dots<R, K>(grad, x, index, batch, to, to_step, count >= 2 * K);
  if (count > 0) dots_rest<R, K - 1>(grad, x, index, batch, to, to_step, count);
}

}  // namespace SK_ISA
}  // namespace sk
