// A sparse product over shifted pixels: what conv2d, conv2d_dgrad and the linear products have in
// common.
//
// out[row][i][j] = sum over the row's non-zeros of weight * src[channel][i*step_y + dy][j*step_x +
// dx], zero outside the image. Forward: rows are output channels, (dy, dx) the taps. dgrad with
// stride s: one product per phase of the input pixel modulo s, whose taps are those that reach the
// phase; each is a unit-stride product over the gradient.
#pragma once

#include "../kernels.h"
#include "scratch.h"
#include "sparse_rows.h"
#include "tile.h"

namespace sk {
namespace SK_ISA {

struct Product {
  TileSource src;
  int64_t src_channels;
  int64_t rows;  // output rows (channels)
  float* dst;    // [rows][dst_height][dst_width][batch]
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
};

// How a product is cut into tiles. Chosen from shapes alone, never from the number of threads,
// wherever it can influence the order of a sum.
struct ProductPlan {
  TileShape tile;
  int log_v;               // vectors per pixel
  int max_log_r;           // highest chunk
  int64_t band_h, band_w;  // output pixels per tile
  int64_t lane_groups, bands_y, bands_x;

  // The last band of a row overlaps its neighbour (see locate): one work item does both.
  bool overlaps(const Product& p) const { return p.out_w % band_w != 0; }
  int64_t items_x(const Product& p) const { return bands_x - (overlaps(p) ? 1 : 0); }
};

// Throws std::invalid_argument if the tile is beyond 32-bit offsets; `g` is for its message.
ProductPlan plan_product(const Product& p, const ConvGeometry& g, int64_t block_rows_at_once);

// Offset of (channel, dy of segment s, dx) in a tile, relative to the output pixel's (dy_first,
// dx_first).
SK_INLINE int64_t tile_offset(const Product& p, const ProductPlan& plan, int64_t channel, int64_t s,
                              int64_t dx) {
  return channel * plan.tile.pitch + s * p.dy_step * plan.tile.row_pitch +
         (dx - p.dx_first) * plan.tile.lanes;
}

// The non-zeros, ready for rows_kernel. Chunks cover every output row once.
struct ProductLists {
  Chunk* chunks;
  int32_t* segments;
  float* words;
  int64_t count;
};

// Number of chunks that `height` rows decompose into, each a power of two up to 1 << max_log_r.
SK_INLINE int64_t chunks_in(int64_t height, int max_log_r) {
  int64_t n = height >> max_log_r;
  for (int l = 0; l < max_log_r; ++l) n += (height >> l) & 1;
  return n;
}
SK_INLINE int chunk_log(int64_t rest, int max_log_r) {
  int l = max_log_r;
  while ((int64_t(1) << l) > rest) --l;
  return l;
}

size_t product_scratch(const Product& p, const ProductPlan& plan, int threads);
void run_product(const Product& p, const ProductPlan& plan, const ProductLists& lists,
                 ScratchLease& lease, int threads);

}  // namespace SK_ISA
}  // namespace sk
