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

// Two ways to meet the image's border:
//   padded   the tile holds the border as zeros, and all columns of a row are worked off together
//   whatever their tap; clipped  the tile holds the image only, and each tap has its own rectangle
//   of pixels: no product with zeros
//            (on a 2x2 image more than half of a padded 3x3 product), but needs many non-zeros per
//            tap.
struct WgradPlan {
  bool clipped;
  TileShape tile;
  int64_t band_channels, bands;  // channels packed at a time
  int64_t band_h, band_w;        // output pixels per tile
  int64_t lane_groups, bands_y, bands_x, tiles;
  int64_t keys_per_band, keys;  // taps if clipped, else 1; times bands
  int64_t parts;                // separate partial sums

  // How far a tap shifts a stored column's input relative to its channel in the tile (clipped: the
  // region does that).
  int64_t tap_offset(const ConvGeometry& g, int64_t tap) const {
    if (clipped) return 0;
    return tap / g.kw * g.dil_h * tile.row_pitch + tap % g.kw * g.dil_w * tile.lanes;
  }
  TileShape grad_shape(const WgradTile& t) const { return tile_shape(tile.lanes, t.rows, t.cols); }
  int64_t grad_floats() const { return 4 * tile_shape(tile.lanes, band_h, band_w).pitch; }
  WgradTile locate(const ConvGeometry& g, int64_t index) const;
  // The rectangle of pixels of one key (a tap, if clipped) in a tile; false where it is empty.
  bool region(const ConvGeometry& g, const WgradTile& t, int64_t tap, DotRegion& d,
              int64_t& grad_at, int64_t& x_at) const;
};

// `per_row`: mean number of stored elements per row of the matrix. Throws std::invalid_argument if
// the tile is beyond 32-bit offsets.
WgradPlan plan_wgrad(const ConvGeometry& g, double per_row);

}  // namespace SK_ISA
}  // namespace sk
