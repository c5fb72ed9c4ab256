// How the weight gradient is cut into tiles: see plan_wgrad.
#pragma once

#include "../kernels.h"
#include "sparse_dots.h"
#include "tile.h"

namespace sk {
namespace SK_ISA {

// One tile: output pixels [i0, i0+rows) x [j0, j0+cols), batch entries from n0; input rows [y0,
// y1), columns from x0.
struct WgradTile {
  int64_t n0, i0, rows, j0, cols, y0, y1, x0;
};

// The pixels of keys [begin, end) in one tile, and where they start in a gradient row and, for the
// tap at no offset, in a channel.
struct KeyRegion {
  int64_t begin, end;
  DotRegion dots;
  int64_t grad_at, x_at;
};

// Two ways to meet the image's border, for rows and for columns of the image:
//   padded   the tile holds the border as zeros, and taps that differ only here are worked off
//            together
//   clipped  no product with zeros: each tap has its own rectangle of pixels, and only taps whose
//            rectangles are equal (away from the border) are worked off together.
// And two places for the operands:
//   packed   tiles of them are copied, as tile.h says
//   direct   nothing is copied: long runs of the tensors themselves, which the hardware prefetches
struct WgradPlan {
  bool clip_y, clip_x, direct;
  TileShape tile;
  int64_t band_channels, bands;  // channels at a time
  int64_t tile_channels;         // channels packed: a block can stick out of its band
  int64_t band_h, band_w;        // output pixels per tile
  int64_t lane_groups, bands_y, bands_x, tiles;
  int64_t taps, keys_per_band;
  int64_t parts;  // separate partial sums

  // Taps of one image column are neighbours: away from the upper and lower border their rectangles
  // are equal.
  int64_t key(const ConvGeometry& g, int64_t tap) const {
    const int64_t y = clip_y ? tap / g.kw : 0, x = clip_x ? tap % g.kw : 0;
    return clip_y ? x * g.kh + y : x;
  }
  // How far a tap shifts a stored column's input relative to its channel in the tile.
  int64_t tap_offset(const ConvGeometry& g, int64_t tap) const {
    return tap / g.kw * g.dil_h * tile.row_pitch + tap % g.kw * g.dil_w * tile.lanes;
  }
  TileShape grad_shape(const WgradTile& t) const { return tile_shape(tile.lanes, t.rows, t.cols); }
  int64_t tile_floats() const { return direct ? 0 : tile_channels * tile.pitch; }
  int64_t grad_floats() const {
    return direct ? 0 : kMaxGradRows * tile_shape(tile.lanes, band_h, band_w).pitch;
  }
  WgradTile locate(const ConvGeometry& g, int64_t index) const;
  // Fills `regions` [keys_per_band] with the rectangles of a tile; returns how many there are.
  int64_t list_regions(const ConvGeometry& g, const WgradTile& t, KeyRegion* regions) const;
  KeyRegion region(const ConvGeometry& g, const WgradTile& t, int64_t key) const;
};

// `per_row`: mean number of stored elements per row of the matrix. Throws std::invalid_argument if
// the tile is beyond 32-bit offsets.
WgradPlan plan_wgrad(const ConvGeometry& g, int64_t bh, int64_t bw, double per_row);

}  // namespace SK_ISA
}  // namespace sk
