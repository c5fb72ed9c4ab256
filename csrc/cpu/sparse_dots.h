// The inner kernel of the weight gradient: R gradient rows against K shifted input channels, R*K
// dot products at once.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

// A rectangle of pixels of one tile, in floats. Gradient rows are packed without gaps, inputs have
// the tile's pitch.
struct DotRegion {
  int64_t lines;              // image rows
  int64_t pixels;             // per image row
  int64_t lanes;              // floats per pixel
  int64_t grad_line, x_line;  // from image row to image row
  int64_t x_step;             // from pixel to pixel in the tile; `lanes` when the stride is 1
  int64_t grad_row;           // from gradient row (output channel) to gradient row
};

// sums[r * K + k] = dot(grad row r, x + offsets[k]) over the region.
using DotKernel = void (*)(const DotRegion&, const float* grad, const float* x,
                           const int32_t* offsets, float* sums);

template <int R, int K>
SK_INLINE void dot_run(Vec (&acc)[R][K], const float* grad, int64_t grad_row,
                       const float* const (&x)[K], int64_t at, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec g[R];
    for (int r = 0; r < R; ++r) g[r] = vload(grad + r * grad_row + i);
    for (int k = 0; k < K; ++k) {
      const Vec xk = vload(x[k] + at + i);
      for (int r = 0; r < R; ++r) acc[r][k] = vfma(g[r], xk, acc[r][k]);
    }
  }
}

template <int R, int K>
void dot_kernel(const DotRegion& d, const float* grad, const float* x, const int32_t* offsets,
                float* sums) {
  Vec acc[R][K];
  const float* xs[K];
  for (int k = 0; k < K; ++k) {
    xs[k] = x + offsets[k];
    for (int r = 0; r < R; ++r) acc[r][k] = vzero();
  }
  for (int64_t line = 0; line < d.lines; ++line, grad += d.grad_line) {
    const int64_t at = line * d.x_line;
    if (d.x_step == d.lanes) {
      dot_run<R, K>(acc, grad, d.grad_row, xs, at, d.pixels * d.lanes);
    } else {
      for (int64_t p = 0; p < d.pixels; ++p)
        dot_run<R, K>(acc, grad + p * d.lanes, d.grad_row, xs, at + p * d.x_step, d.lanes);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) sums[r * K + k] = vsum(acc[r][k]);
}

}  // namespace SK_ISA
}  // namespace sk
