// A sparse product over shifted pixels: what conv2d, conv2d_dgrad and the linear products have in
// common.
//
// out[row][i][j] = sum over the row's non-zeros of weight * src[channel][i*step_y + dy][j*step_x +
// dx], zero outside the image. Forward: rows are output channels, (dy, dx) the taps. dgrad with
// stride s: one product per phase of the input pixel modulo s, whose taps are those that reach the
// phase; each is a unit-stride product over the gradient.
#pragma once

#include "../kernels.h"
#include "../variants.h"
#include "scatter_rows.h"
#include "scratch.h"
#include "slab.h"

namespace sk {
namespace SK_ISA {

struct Product {
  TileSource src;
  int64_t src_channels;
  int64_t seg_channels;  // those of one group
  int64_t rows;          // output rows (channels)
  float* dst;            // [rows][dst_height][dst_width][batch]
  int64_t dst_height, dst_width;
  int64_t first_y, first_x;   // first output pixel computed
  int64_t every_y, every_x;   // distance between the output pixels computed
  int64_t out_h, out_w;       // how many are computed
  int64_t step_y, step_x;     // input step per output pixel
  int64_t segments;           // vertical taps
  int64_t dy_first, dy_step;  // tap s is at dy = dy_first + s * dy_step, dy_step > 0
  int64_t dx_first, dx_last;  // range of horizontal taps
  const float* bias;
  bool relu;
  double per_channel;  // mean number of stored elements per source channel
  // Neighbouring source channels that share their stored columns (the height of a V x 1 block,
  // seen from its transposed side), 1 if none do; horizontal taps.
  int64_t source_block, taps_x;
  Variant variant;
};

// How a product is cut. Chosen from shapes alone, never from the number of threads, wherever it can
// influence the order of a sum.
struct ProductPlan {
  SlabShape slab;
  int log_v;        // vectors per pixel
  int max_log_r;    // highest chunk
  int64_t rows_h;   // output rows of a slab
  int64_t strips;   // the image's width in so many parts, see strip_begin
  int64_t strip_w;  // output pixels of the widest
  int64_t lane_groups;
  bool gapless;    // the slab takes whole pixels of one cache line: runs of memory are packed
  bool long_rows;  // one output row at a time (long_rows.h) instead of one pixel block at a time
  // Bands: channels of a group in `channel_bands` ranges, vertical taps in `seg_bands` ranges.
  int64_t band_channels, channel_bands, band_segs, seg_bands;

  // Scattering (scatter_rows.h) instead of gathering: output rows of a band, log2 of a pixel
  // block's vectors.
  bool scatter;
  int64_t scatter_rows;
  int scatter_log;

  int64_t bands() const { return channel_bands * seg_bands; }
  int64_t strip_begin(const Product& p, int64_t strip) const { return p.out_w * strip / strips; }
};

// A number that tells plans apart.
uint64_t plan_print(const ProductPlan& plan);

// Output pixels that one kernel call keeps in registers.
int64_t pixels_at_once(int64_t width, int log_r, int log_v);

// Throws std::invalid_argument if the slab is beyond 32-bit offsets; `g` is for its message.
ProductPlan plan_product(const Product& p, const ConvGeometry& g, int64_t block_rows_at_once);

// Offset of (dy of segment s, dx) in a slab, relative to the output pixel's (dy_first, dx_first).
SK_INLINE int64_t tap_offset(const Product& p, const ProductPlan& plan, int64_t s, int64_t dx) {
  return s * p.dy_step * plan.slab.row_pitch + slab_column(plan.slab, dx - p.dx_first);
}

// The non-zeros, ready for rows_kernel. Chunks cover every output row once.
struct ProductLists {
  Chunk* chunks;
  uint32_t* starts;  // [band][chunk][segment of the band], and the end of the last
  int32_t* offsets;  // [entry]: into the slab
  int32_t* sources;  // [entry]: index of its first weight in the pattern's values
  int64_t count;     // of chunks
};

// log2 of the height of the next chunk where `rest` rows are left: a power of two up to
// 1 << max_log_r.
SK_INLINE int chunk_log(int64_t rest, int max_log_r) {
  int l = max_log_r;
  while ((int64_t(1) << l) > rest) --l;
  return l;
}

size_t product_scratch(const Product& p, const ProductPlan& plan, int threads);
// `weights`: [entry][1 << plan.max_log_r].
void run_product(const Product& p, const ProductPlan& plan, const ProductLists& lists,
                 const float* weights, ScratchLease& lease, int threads);
// `weights`: [entry][stride].
void run_scatter(const Product& p, const ProductPlan& plan, const ScatterLists& lists,
                 const float* weights, int64_t stride, ScratchLease& lease, int threads);

}  // namespace SK_ISA
}  // namespace sk
