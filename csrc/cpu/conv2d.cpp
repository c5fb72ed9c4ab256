// conv2d and conv2d_dgrad: both turn the pattern into lists for the one sparse product of
// sparse_product.h.
#include "conv2d.h"

#include "conv2d_walk.h"
#include "pattern_check.h"
#include "scatter_dgrad.h"
#include "scatter_lists.h"
#include "stream.h"

namespace sk {
namespace SK_ISA {
namespace {

// What a flattened slab may take of the second-level cache: of a 1x1 kernel, where the next one is
// fetched meanwhile, and of taller ones.
constexpr int64_t kFlatSlabBytes = 256 * 1024;
constexpr int64_t kFlatTallSlabBytes = 320 * 1024;
// Pixels of a run: 8 KB are long enough, and the search for a divisor stays short.
constexpr int64_t kFlatMostPixels = 128;

// Least share of the registers that blocks of a run fill.
constexpr double kFlatShare = 0.74;

// Floats of a pixel of a flattened image: one cache line.
constexpr int64_t kFlatBatch = 16;

// Widest divisor of `pixels` up to `most` that fills registers well (blocks of 4 pixels), by more
// than `least_share`; 0 where none does.
int64_t flat_width(int64_t pixels, int64_t most, double least_share) {
  int64_t best = 0;
  double best_share = least_share;
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
ConvGeometry flatten(const ConvGeometry& g, int64_t channels, Variant variant) {
  if (variant == Variant::kImage) return g;
  const bool always = variant == Variant::kFlat;
  if (g.stride_w != 1 || g.stride_h != 1 || g.in_h * g.in_w == 1) return g;
  ConvGeometry flat = g;
  flat.batch = kFlatBatch;
  const bool pad = g.pad_top != 0 || g.pad_left != 0 || g.pad_bottom != 0 || g.pad_right != 0;
  if (g.kh == 1 && g.kw == 1 && !pad) {
    const int64_t floats = g.batch * g.in_h * g.in_w;
    if (floats % kFlatBatch != 0) return g;
    const int64_t pixels = floats / kFlatBatch;
    const int64_t most = kFlatSlabBytes / imax<int64_t>(1, channels * kFlatBatch * 4);
    const int64_t width =
        always ? flat_width(pixels, kFlatMostPixels, 0)
               : flat_width(pixels, imin(imax<int64_t>(most, 8), kFlatMostPixels), kFlatShare);
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
  const double slab = double(imin(3 * reach, g.out_w * f + reach)) * column;
  if (slab > kFlatTallSlabBytes && !always) return g;
  flat.in_w *= f;
  flat.out_w *= f;
  flat.pad_left *= f;
  flat.pad_right *= f;
  flat.dil_w *= f;
  return flat;
}

// Without the addresses. `stored`: blocks.
Product forward_product(const ConvGeometry& g, const Blocks& b, int64_t stored, Variant variant) {
  Product p{};
  p.src = {nullptr, g.in_h, g.in_w, g.batch};
  p.src_channels = g.in_channels;
  p.seg_channels = b.seg_cols;
  p.rows = g.out_channels;
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
  p.per_channel = double(stored) * double(b.bh * b.bw) / double(imax<int64_t>(1, g.in_channels));
  p.variant = variant;
  return p;
}

// One phase of dgrad without the addresses. `stored`: blocks, of all phases.
Product phase_product(const ConvGeometry& g, const Blocks& b, const Phase& f, int64_t stored,
                      Variant variant) {
  Product p{};
  p.src = {nullptr, g.out_h, g.out_w, g.batch};
  p.src_channels = g.out_channels;
  p.seg_channels = b.seg_rows;
  p.rows = g.in_channels;
  p.dst_height = g.in_h;
  p.dst_width = g.in_w;
  p.first_y = f.y0;
  p.first_x = f.x0;
  p.every_y = g.stride_h;
  p.every_x = g.stride_w;
  p.out_h = ceil_div(g.in_h - f.y0, g.stride_h);
  p.out_w = ceil_div(g.in_w - f.x0, g.stride_w);
  p.step_y = p.step_x = 1;
  p.segments = f.count_y;
  p.source_block = b.bw == 1 ? b.bh : 1;
  p.taps_x = f.count_x;
  const double per_channel =
      double(stored) * double(b.bh * b.bw) / double(imax<int64_t>(1, g.out_channels));
  p.per_channel = per_channel * double(f.count_y * f.count_x) / double(g.kh * g.kw);
  // Exact divisions: phase_taps chose the taps so.
  p.dy_first = (f.y0 + g.pad_top - (f.ky[0] + (f.count_y - 1) * f.ky[1]) * g.dil_h) / g.stride_h;
  p.dy_step = f.ky[1] * g.dil_h / g.stride_h;
  p.dx_first = (f.x0 + g.pad_left - (f.kx[0] + (f.count_x - 1) * f.kx[1]) * g.dil_w) / g.stride_w;
  p.dx_last = (f.x0 + g.pad_left - f.kx[0] * g.dil_w) / g.stride_w;
  p.variant = variant;
  return p;
}

// Calls run(phase) for every phase that a tap reaches, clear(y0, x0) for the others, where x0 < 0
// stands for whole rows.
template <class Run, class Clear>
void each_phase(const ConvGeometry& g, Run run, Clear clear) {
  for (int64_t y0 = 0; y0 < imin(g.stride_h, g.in_h); ++y0) {
    Phase f;
    f.y0 = y0;
    phase_taps(y0, g.pad_top, g.dil_h, g.stride_h, g.kh, f.ky, f.count_y);
    if (f.count_y == 0) {
      clear(y0, -1);
      continue;
    }
    for (int64_t x0 = 0; x0 < imin(g.stride_w, g.in_w); ++x0) {
      f.x0 = x0;
      phase_taps(x0, g.pad_left, g.dil_w, g.stride_w, g.kw, f.kx, f.count_x);
      if (f.count_x == 0) {
        clear(y0, x0);
      } else {
        run(f);
      }
    }
  }
}

void run_phase(const ConvGeometry& g, const Blocks& b, const Phase& f, const Product& p,
               const Weights& w, ListCache* cache, int threads) {
  const ListKey key = list_key(g, b.bh, b.bw, 1 + f.y0 * g.stride_w + f.x0, p.variant);
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

// Whether the input gradient is scattered without packing (scatter_dgrad.h).
bool scatters_now(const ConvGeometry& g, int64_t stored, Variant variant) {
  return variant == Variant::kRule ? scatters(g, stored) : variant == Variant::kScatter;
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
  const Variant variant = find_variant({Pass::kConv2d, geometry, bh, bw, capacity});
  const ConvGeometry g = flatten(geometry, geometry.in_channels, variant);
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_rows = g.groups * b.row_blocks;
  if (!is_known(cache, list_key(g, b.bh, b.bw, 0, variant))) {
    check_pattern(
        {"crow_indices", "col_indices", crow, col, nullptr, block_rows, g.kh * g.kw * b.col_blocks},
        capacity, threads);
  }
  if (g.batch * g.out_h * g.out_w * g.out_channels <= 0) return;
  const Weights w{values, crow, col, nullptr};
  Product p = forward_product(g, b, crow[block_rows], variant);
  p.src.data = x;
  p.dst = y;
  p.bias = bias;
  p.relu = relu;
  const RowBlocks rows{g.groups, b.row_blocks, b.seg_rows, bh};
  run_with_lists(
      p, rows, g, values, bw, cache, list_key(g, b.bh, b.bw, 0, variant), threads,
      [&](int64_t block) { return int64_t(crow[block + 1] - crow[block]) * bw; },
      [&](ChunkOwner owner, ListVisitor& visitor) { walk_forward(g, b, w, owner, visitor); });
}

void conv2d_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& geometry,
                  int64_t bh, int64_t bw, int64_t capacity, ListCache* cache, int threads) {
  const Variant variant = find_variant({Pass::kConv2dDgrad, geometry, bh, bw, capacity});
  const ConvGeometry g = flatten(geometry, geometry.out_channels, variant);
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_cols = g.kh * g.kw * b.col_blocks;
  if (!is_known(cache, list_key(g, b.bh, b.bw, 1, variant))) {
    check_pattern({"t_crow", "t_row", t_crow, t_row, t_perm, block_cols, g.groups * b.row_blocks},
                  capacity, threads);
  }
  if (g.batch * g.in_h * g.in_w * g.in_channels <= 0) return;
  if (scatters_now(geometry, int64_t(t_crow[block_cols]) * bh * bw, variant)) {
    scatter_dgrad(dx, grad, values, t_crow, t_row, t_perm, geometry, bh, bw, threads);
    return;
  }
  const Weights w{values, t_crow, t_row, t_perm};
  each_phase(
      g,
      [&](const Phase& f) {
        Product p = phase_product(g, b, f, t_crow[block_cols], variant);
        p.src.data = grad;
        p.dst = dx;
        run_phase(g, b, f, p, w, cache, threads);
      },
      [&](int64_t y0, int64_t x0) { clear_pixels(dx, g, y0, x0, threads); });
}

uint64_t conv2d_print(const VariantKey& key, Variant variant) {
  const bool forward = key.pass == Pass::kConv2d;
  if (!forward && scatters_now(key.g, key.capacity * key.bh * key.bw, variant)) return 1;
  const ConvGeometry g = flatten(key.g, forward ? key.g.in_channels : key.g.out_channels, variant);
  const Blocks b = blocks_of(g, key.bh, key.bw);
  uint64_t print = mix_print(mix_print(0, g.batch), g.in_w);
  if (forward) {
    const Product p = forward_product(g, b, key.capacity, variant);
    return mix_print(print, int64_t(plan_print(plan_product(p, g, key.bh))));
  }
  each_phase(
      g,
      [&](const Phase& f) {
        const Product p = phase_product(g, b, f, key.capacity, variant);
        print = mix_print(print, int64_t(plan_print(plan_product(p, g, key.bw))));
      },
      [](int64_t, int64_t) {});
  return print;
}

}  // namespace SK_ISA
}  // namespace sk
