// The stored blocks of a convolution's pattern in the orders in which its products list them.
#pragma once

#include "product_lists.h"

namespace sk {
namespace SK_ISA {

struct Blocks {
  int64_t bh, bw;
  int64_t row_blocks, col_blocks;  // per group, per tap
  int64_t seg_rows, seg_cols;      // matrix rows per group, columns per tap
};

inline Blocks blocks_of(const ConvGeometry& g, int64_t bh, int64_t bw) {
  const int64_t rows = g.out_channels / g.groups, cols = g.in_channels / g.groups;
  return {bh, bw, ceil_div(rows, bh), ceil_div(cols, bw), rows, cols};
}

struct Weights {
  const float* values;
  const int32_t *crow, *col, *perm;  // forward: crow, col; dgrad: t_crow, t_row, t_perm
};

// The stored blocks of one block row, tap by tap, channel by channel.
inline void walk_forward(const ConvGeometry& g, const Blocks& b, const Weights& w, ChunkOwner owner,
                         ListVisitor& visitor) {
  const int64_t group = owner.block / b.row_blocks;
  // Columns are sorted: taps are met in order, and no division per non-zero is needed (it would
  // cost more than the products of a small batch).
  int64_t tap_start = 0, tap_end = 0, ky = 0, kx = -1;
  for (int64_t e = w.crow[owner.block]; e < w.crow[owner.block + 1]; ++e) {
    if (w.col[e] >= tap_end) {
      while (w.col[e] >= tap_end) {
        tap_start = tap_end;
        tap_end += b.col_blocks;
        if (++kx == g.kw) {
          kx = 0;
          ++ky;
        }
      }
      visitor.tap(ky, kx * g.dil_w - g.pad_left, group);
    }
    const int64_t c0 = (w.col[e] - tap_start) * b.bw;
    const int64_t width = imin(b.bw, b.seg_cols - c0);
    const int64_t block = (e * b.bh + owner.row) * b.bw;
    for (int64_t c = 0; c < width; ++c) visitor.entry(c0 + c, block + c);
  }
}

// One phase of dgrad: the taps that connect input pixels (y0 + i*stride_h, x0 + j*stride_w) to
// output pixels.
struct Phase {
  int64_t y0, x0;
  int64_t ky[2], kx[2];      // first tap and distance to the next; taps below kh, kw
  int64_t count_y, count_x;  // number of taps
};

SK_INLINE int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t t = a % b;
    a = b;
    b = t;
  }
  return a;
}

// Taps k < kernel with (at + pad - k*dil) divisible by stride: an arithmetic progression.
inline void phase_taps(int64_t at, int64_t pad, int64_t dil, int64_t stride, int64_t kernel,
                       int64_t* k, int64_t& count) {
  k[0] = 0;
  k[1] = stride / gcd(stride, dil);
  while (k[0] < imin(kernel, k[1]) && (at + pad - k[0] * dil) % stride != 0) ++k[0];
  count = k[0] < imin(kernel, k[1]) ? (kernel - 1 - k[0]) / k[1] + 1 : 0;
}

// Stored blocks of one block column that belong to one group.
inline void column_range(const ConvGeometry& g, const Blocks& b, const Weights& w,
                         int64_t block_col, int64_t group, int32_t& lo, int32_t& hi) {
  lo = w.crow[block_col];
  hi = w.crow[block_col + 1];
  if (g.groups > 1) {
    lo = int32_t(lower_bound(w.col, lo, hi, group * b.row_blocks));
    hi = int32_t(lower_bound(w.col, lo, hi, (group + 1) * b.row_blocks));
  }
}

inline int64_t count_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
                           int64_t group, int64_t j) {
  int64_t n = 0;
  for (int64_t a = 0; a < f.count_y; ++a) {
    for (int64_t c = 0; c < f.count_x; ++c) {
      const int64_t tap = (f.ky[0] + a * f.ky[1]) * g.kw + f.kx[0] + c * f.kx[1];
      int32_t lo, hi;
      column_range(g, b, w, tap * b.col_blocks + j, group, lo, hi);
      n += hi - lo;
    }
  }
  return n * b.bh;
}

// Block column j of every tap of the phase. Taps run backwards, so that dy grows.
inline void walk_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
                       ChunkOwner owner, ListVisitor& visitor) {
  const int64_t group = owner.block / b.col_blocks, j = owner.block % b.col_blocks;
  for (int64_t s = 0; s < f.count_y; ++s) {
    const int64_t ky = f.ky[0] + (f.count_y - 1 - s) * f.ky[1];
    for (int64_t t = f.count_x - 1; t >= 0; --t) {
      const int64_t kx = f.kx[0] + t * f.kx[1];
      int32_t lo, hi;
      column_range(g, b, w, (ky * g.kw + kx) * b.col_blocks + j, group, lo, hi);
      if (lo == hi) continue;
      visitor.tap(s, (f.x0 + g.pad_left - kx * g.dil_w) / g.stride_w, group);
      for (int32_t e = lo; e < hi; ++e) {
        const int64_t i = w.col[e] - group * b.row_blocks;
        const int64_t height = imin(b.bh, b.seg_rows - i * b.bh);
        const int64_t block = int64_t(w.perm[e]) * b.bh * b.bw + owner.row;
        for (int64_t h = 0; h < height; ++h) visitor.entry(i * b.bh + h, block + h * b.bw);
      }
    }
  }
}

// The stored blocks of one input channel, for scatter_lists.h; blocks one column wide.
template <class Visit>
void walk_column(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
                 int64_t channel, Visit visit) {
  const int64_t group = channel / b.seg_cols, j = channel % b.seg_cols;
  for (int64_t s = 0; s < f.count_y; ++s) {
    const int64_t ky = f.ky[0] + (f.count_y - 1 - s) * f.ky[1];
    for (int64_t t = 0; t < f.count_x; ++t) {
      const int64_t kx = f.kx[0] + (f.count_x - 1 - t) * f.kx[1];
      int32_t lo, hi;
      column_range(g, b, w, (ky * g.kw + kx) * b.col_blocks + j, group, lo, hi);
      for (int32_t e = lo; e < hi; ++e) visit(s, t, int64_t(w.col[e]), int64_t(w.perm[e]));
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
