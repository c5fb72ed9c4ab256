// The inner kernel of the weight gradient: R gradient rows against K shifted input channels, R*K
// dot products at once.
#pragma once

#include "dot_sums.h"

namespace sk {
namespace SK_ISA {

// Accumulators of one call: they must hide the latency of two FMA units (8), and leave registers
// for R gradient vectors or K input vectors.
constexpr int kDotAccumulators = kLanes >= 16 ? 24 : 12;
// Gradient rows that one call can take.
constexpr int kMaxGradRows = 4;
// One pointer register per column.
constexpr int kMaxColumns = 8;

constexpr int max_columns(int rows) {
  return kDotAccumulators / rows < kMaxColumns ? kDotAccumulators / rows : kMaxColumns;
}

// A rectangle of pixels, in floats. The pixels of one line of gradients lie without gaps.
struct DotRegion {
  int64_t lines;              // image rows
  int64_t steps, run;         // pieces without gaps per image row, and their length (any)
  int64_t grad_line, x_line;  // from image row to image row
  int64_t x_step;             // from piece to piece of the input
  int64_t grad_channel;       // from gradient row (output channel) to gradient row
};

// to[k * to_step + r] += dot(grad row r, x + columns[k] * scale) over the region.
using DotKernel = void (*)(const DotRegion&, const float* grad, const float* x,
                           const int32_t* columns, int64_t scale, float* to, int64_t to_step);

// One step of kLanes floats from i on; Load reads them.
template <int R, int K, class Load>
SK_INLINE void dot_step(Vec (&acc)[K * R], const float* const (&grad)[R],
                        const float* const (&x)[K], int64_t i, Load load) {
  if constexpr (R <= K) {
    Vec g[R];
    SK_UNROLL
    for (int r = 0; r < R; ++r) g[r] = load(grad[r] + i);
    SK_UNROLL
    for (int k = 0; k < K; ++k) {
      const Vec xk = load(x[k] + i);
      SK_UNROLL
      for (int r = 0; r < R; ++r) acc[k * R + r] = vfma(g[r], xk, acc[k * R + r]);
    }
  } else {
    Vec xk[K];
    SK_UNROLL
    for (int k = 0; k < K; ++k) xk[k] = load(x[k] + i);
    SK_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec g = load(grad[r] + i);
      SK_UNROLL
      for (int k = 0; k < K; ++k) acc[k * R + r] = vfma(g, xk[k], acc[k * R + r]);
    }
  }
}

template <int R, int K>
SK_INLINE void dot_run(Vec (&acc)[K * R], const float* const (&grad)[R], const float* const (&x)[K],
                       int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    dot_step<R, K>(acc, grad, x, i, [](const float* p) { return vload(p); });
  if (i < n)
    dot_step<R, K>(acc, grad, x, i, [n, i](const float* p) { return vload_part(p, n - i); });
}

template <int R, int K>
void dot_kernel(const DotRegion& d, const float* grad, const float* x, const int32_t* columns,
                int64_t scale, float* to, int64_t to_step) {
  Vec acc[K * R];
  SK_UNROLL
  for (int i = 0; i < K * R; ++i) acc[i] = vzero();
  int64_t line = 0;
  do {
    const float* gs[R];
    SK_UNROLL
    for (int r = 0; r < R; ++r) gs[r] = grad + r * d.grad_channel + line * d.grad_line;
    const float* xs[K];
    SK_UNROLL
    for (int k = 0; k < K; ++k) xs[k] = x + columns[k] * scale + line * d.x_line;
    int64_t step = d.steps;
    do {
      dot_run<R, K>(acc, gs, xs, d.run);
      SK_UNROLL
      for (int r = 0; r < R; ++r) gs[r] += d.run;
      SK_UNROLL
      for (int k = 0; k < K; ++k) xs[k] += d.x_step;
    } while (--step > 0);
  } while (++line < d.lines);
  if (to_step == R) {
    add_sums(to, acc);
    return;
  }
  float sums[K * R] = {};
  add_sums(sums, acc);
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) to[k * to_step + r] += sums[k * R + r];
}

}  // namespace SK_ISA
}  // namespace sk
