// conv2d and conv2d_dgrad: both turn the pattern into lists for the one sparse product of
// sparse_product.h.
#include "conv2d.h"

#include "pattern_check.h"
#include "scatter_dgrad.h"
#include "scatter_lists.h"
#include "stream.h"

namespace sk {
namespace SK_ISA {
namespace {

struct Blocks {
  int64_t bh, bw;
  int64_t row_blocks, col_blocks;  // per group, per tap
  int64_t seg_rows, seg_cols;      // matrix rows per group, columns per tap
};

Blocks blocks_of(const ConvGeometry& g, int64_t bh, int64_t bw) {
  const int64_t rows = g.out_channels / g.groups, cols = g.in_channels / g.groups;
  return {bh, bw, ceil_div(rows, bh), ceil_div(cols, bw), rows, cols};
}

struct Weights {
  const float* values;
  const int32_t *crow, *col, *perm;  // forward: crow, col; dgrad: t_crow, t_row, t_perm
};

// The stored blocks of one block row, tap by tap, channel by channel.
void walk_forward(const ConvGeometry& g, const Blocks& b, const Weights& w, ChunkOwner owner,
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
void phase_taps(int64_t at, int64_t pad, int64_t dil, int64_t stride, int64_t kernel, int64_t* k,
                int64_t& count) {
  k[0] = 0;
  k[1] = stride / gcd(stride, dil);
  while (k[0] < imin(kernel, k[1]) && (at + pad - k[0] * dil) % stride != 0) ++k[0];
  count = k[0] < imin(kernel, k[1]) ? (kernel - 1 - k[0]) / k[1] + 1 : 0;
}

// Stored blocks of one block column that belong to one group.
void column_range(const ConvGeometry& g, const Blocks& b, const Weights& w, int64_t block_col,
                  int64_t group, int32_t& lo, int32_t& hi) {
  lo = w.crow[block_col];
  hi = w.crow[block_col + 1];
  if (g.groups > 1) {
    lo = int32_t(lower_bound(w.col, lo, hi, group * b.row_blocks));
    hi = int32_t(lower_bound(w.col, lo, hi, (group + 1) * b.row_blocks));
  }
}

int64_t count_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
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
void walk_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
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

// What a flattened slab may take of the second-level cache: of a 1x1 kernel, where the next one is
// fetched meanwhile, and of taller ones.
constexpr int64_t kFlatSlabBytes = 256 * 1024;
constexpr int64_t kFlatTallSlabBytes = 320 * 1024;
// Pixels of a run: 8 KB are long enough, and the search for a divisor stays short.
constexpr int64_t kFlatMostPixels = 128;

// Floats of a pixel of a flattened image: one cache line.
constexpr int64_t kFlatBatch = 16;

// Widest divisor of `pixels` up to `most` that fills registers well (blocks of 4 pixels); 0 where
// none does.
int64_t flat_width(int64_t pixels, int64_t most) {
  int64_t best = 0;
  double best_share = 0.74;
  for (int64_t w = imin(pixels, most); w >= 4; --w) {
    if (pixels % w != 0) continue;
    const double share = double(w * w) / double((w + 1) * round_up(w, int64_t(4)));
    if (share > best_share) best_share = share, best = w;
  }
  return best;
}

// The same convolution over an image whose pixels are 16 neighbouring floats, if its slab is small.
// With a horizontal stride of 1 an image row [width][batch] is one run of floats, and a tap shifts
// it by whole pixels: a batch of 128 is 8 pixels of 16 side by side, taps 8 times as far apart. A
// 1x1 convolution has no rows either. What is packed, read and written then lies without gaps;
// otherwise it is 64 bytes of each pixel. `channels`: of the source.
ConvGeometry flatten(const ConvGeometry& g, int64_t channels) {
  if (g.stride_w != 1 || g.stride_h != 1 || g.in_h * g.in_w == 1) return g;
  ConvGeometry flat = g;
  flat.batch = kFlatBatch;
  const bool pad = g.pad_top != 0 || g.pad_left != 0 || g.pad_bottom != 0 || g.pad_right != 0;
  if (g.kh == 1 && g.kw == 1 && !pad) {
    const int64_t floats = g.batch * g.in_h * g.in_w;
    if (floats % kFlatBatch != 0) return g;
    const int64_t pixels = floats / kFlatBatch;
    const int64_t most = kFlatSlabBytes / imax<int64_t>(1, channels * kFlatBatch * 4);
    const int64_t width = flat_width(pixels, imin(imax<int64_t>(most, 8), kFlatMostPixels));
    if (width == 0) return g;
    flat.in_w = flat.out_w = width;
    flat.in_h = flat.out_h = pixels / width;
    return flat;
  }
  if (g.batch % kFlatBatch != 0 || g.batch == kFlatBatch) return g;
  const int64_t f = g.batch / kFlatBatch;
  // Taps reach further than before: strips must be wide against what neighbours pack both.
  const int64_t rows = (g.kh - 1) * g.dil_h + 1, reach = (g.kw - 1) * g.dil_w * f;
  const double column = double(channels) * double(rows) * double(kFlatBatch) * 4;
  if (double(imin(3 * reach, g.out_w * f + reach)) * column > kFlatTallSlabBytes) return g;
  flat.in_w *= f;
  flat.out_w *= f;
  flat.pad_left *= f;
  flat.pad_right *= f;
  flat.dil_w *= f;
  return flat;
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

void run_phase(const ConvGeometry& g, const Blocks& b, const Phase& f, const Product& p,
               const Weights& w, ListCache* cache, int threads) {
  const ListKey key = list_key(g, b.bh, b.bw, 1 + f.y0 * g.stride_w + f.x0);
  const ProductPlan plan = plan_product(p, g, b.bw);
  if (plan.scatter) {
    const SourceBlocks source{g.groups, b.row_blocks, b.seg_rows,
                              b.bh,     f.count_x,    f.kx[1] * g.dil_w / g.stride_w};
    scatter_with_lists(
        p, plan, source, g, w.values, cache, key, threads,
        [&](int64_t channel, auto visit) { walk_column(g, b, f, w, channel, visit); });
    return;
  }
  const RowBlocks rows{g.groups, b.col_blocks, b.seg_cols, b.bw};
  run_with_lists(
      p, rows, g, w.values, 1, cache, key, threads,
      [&](int64_t block) {
        return count_dgrad(g, b, f, w, block / b.col_blocks, block % b.col_blocks);
      },
      [&](ChunkOwner owner, ListVisitor& visitor) { walk_dgrad(g, b, f, w, owner, visitor); });
}

// Clears the input gradient's pixels that no tap reaches: whole rows [y0 + i * stride_h], or with
// `x0` >= 0 the columns x0 + j * stride_w of them.
void clear_pixels(float* dx, const ConvGeometry& g, int64_t y0, int64_t x0, int threads) {
  const int64_t row = g.in_w * g.batch, rows = ceil_div(g.in_h - y0, g.stride_h);
  const int64_t run = x0 < 0 ? row : g.batch, step = x0 < 0 ? row : g.stride_w * g.batch;
  const bool stream = Streams(dx, g.in_channels * g.in_h, row) && g.batch % kLanes == 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < g.in_channels * rows; ++item) {
      const int64_t c = item / rows, y = y0 + item % rows * g.stride_h;
      float* const from = dx + (c * g.in_h + y) * row;
      for (float* at = from + imax<int64_t>(0, x0) * g.batch; at < from + row; at += step) {
        if (!stream) {
          zero_floats(at, run);
          continue;
        }
        for (int64_t i = 0; i < run; i += kLanes) vstream(at + i, vzero());
      }
    }
    if (stream) vfence();
  }
}

}  // namespace

void conv2d(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
            int64_t capacity, bool relu, ListCache* cache, int threads) {
  const ConvGeometry g = flatten(geometry, geometry.in_channels);
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_rows = g.groups * b.row_blocks;
  if (!is_known(cache, list_key(g, b.bh, b.bw, 0))) {
    check_pattern(
        {"crow_indices", "col_indices", crow, col, nullptr, block_rows, g.kh * g.kw * b.col_blocks},
        capacity, threads);
  }
  if (g.batch * g.out_h * g.out_w * g.out_channels <= 0) return;
  const Weights w{values, crow, col, nullptr};
  Product p{};
  p.src = {x, g.in_h, g.in_w, g.batch};
  p.src_channels = g.in_channels;
  p.seg_channels = b.seg_cols;
  p.rows = g.out_channels;
  p.dst = y;
  p.dst_height = p.out_h = g.out_h;
  p.dst_width = p.out_w = g.out_w;
  p.every_y = p.every_x = 1;
  p.step_y = g.stride_h;
  p.step_x = g.stride_w;
  p.segments = g.kh;
  p.dy_first = -g.pad_top;
  p.dy_step = g.dil_h;
  p.dx_first = -g.pad_left;
  p.dx_last = (g.kw - 1) * g.dil_w - g.pad_left;
  p.bias = bias;
  p.relu = relu;
  p.per_channel =
      double(crow[block_rows]) * double(bh * bw) / double(imax<int64_t>(1, g.in_channels));
  const RowBlocks rows{g.groups, b.row_blocks, b.seg_rows, bh};
  run_with_lists(
      p, rows, g, values, bw, cache, list_key(g, b.bh, b.bw, 0), threads,
      [&](int64_t block) { return int64_t(crow[block + 1] - crow[block]) * bw; },
      [&](ChunkOwner owner, ListVisitor& visitor) { walk_forward(g, b, w, owner, visitor); });
}

void conv2d_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& geometry,
                  int64_t bh, int64_t bw, int64_t capacity, ListCache* cache, int threads) {
  const ConvGeometry g = flatten(geometry, geometry.out_channels);
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_cols = g.kh * g.kw * b.col_blocks;
  if (!is_known(cache, list_key(g, b.bh, b.bw, 1))) {
    check_pattern({"t_crow", "t_row", t_crow, t_row, t_perm, block_cols, g.groups * b.row_blocks},
                  capacity, threads);
  }
  if (g.batch * g.in_h * g.in_w * g.in_channels <= 0) return;
  if (scatters(geometry, int64_t(t_crow[block_cols]) * bh * bw)) {
    scatter_dgrad(dx, grad, values, t_crow, t_row, t_perm, geometry, bh, bw, threads);
    return;
  }
  const double per_channel =
      double(t_crow[block_cols]) * double(bh * bw) / double(imax<int64_t>(1, g.out_channels));
  const Weights w{values, t_crow, t_row, t_perm};
  for (int64_t y0 = 0; y0 < imin(g.stride_h, g.in_h); ++y0) {
    Phase f;
    f.y0 = y0;
    phase_taps(y0, g.pad_top, g.dil_h, g.stride_h, g.kh, f.ky, f.count_y);
    if (f.count_y == 0) {
      clear_pixels(dx, g, y0, -1, threads);
      continue;
    }
    for (int64_t x0 = 0; x0 < imin(g.stride_w, g.in_w); ++x0) {
      f.x0 = x0;
      phase_taps(x0, g.pad_left, g.dil_w, g.stride_w, g.kw, f.kx, f.count_x);
      if (f.count_x == 0) {
        clear_pixels(dx, g, y0, x0, threads);
        continue;
      }
      Product p{};
      p.src = {grad, g.out_h, g.out_w, g.batch};
      p.src_channels = g.out_channels;
      p.seg_channels = b.seg_rows;
      p.rows = g.in_channels;
      p.dst = dx;
      p.dst_height = g.in_h;
      p.dst_width = g.in_w;
      p.first_y = y0;
      p.first_x = x0;
      p.every_y = g.stride_h;
      p.every_x = g.stride_w;
      p.out_h = ceil_div(g.in_h - y0, g.stride_h);
      p.out_w = ceil_div(g.in_w - x0, g.stride_w);
      p.step_y = p.step_x = 1;
      p.segments = f.count_y;
      p.source_block = b.bw == 1 ? b.bh : 1;
      p.taps_x = f.count_x;
      p.per_channel = per_channel * double(f.count_y * f.count_x) / double(g.kh * g.kw);
      // Exact divisions: phase_taps chose the taps so.
      p.dy_first = (y0 + g.pad_top - (f.ky[0] + (f.count_y - 1) * f.ky[1]) * g.dil_h) / g.stride_h;
      p.dy_step = f.ky[1] * g.dil_h / g.stride_h;
      p.dx_first = (x0 + g.pad_left - (f.kx[0] + (f.count_x - 1) * f.kx[1]) * g.dil_w) / g.stride_w;
      p.dx_last = (x0 + g.pad_left - f.kx[0] * g.dil_w) / g.stride_w;
      run_phase(g, b, f, p, w, cache, threads);
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
