// How the weight gradient is cut into tiles: see plan_wgrad.
#pragma once

#include "../kernels.h"
#include "../variants.h"
#include "sparse_dots.h"

namespace sk {
namespace SK_ISA {

// Output pixels [i0, i0+rows) x [j0, j0+cols), all of the batch.
struct WgradTile {
  int64_t i0, rows, j0, cols;
};

// The pixels of keys [begin, end) in one tile, and where they start in a gradient row and, for a
// tap that shifts by nothing, in an input channel.
struct KeyRegion {
  int64_t begin, end;
  DotRegion dots;
  int64_t grad_at, x_at;
};

// Nothing is packed: a dot product runs along image rows as they lie in memory, [width][batch], in
// runs that the hardware prefetches; a shift by a tap moves the start of a run. Tiles bound what is
// read again and again (the input rows of a band of channels) to what the caches hold.
//
// Nothing is multiplied with the zeros around an image either: each tap has its own rectangle of
// output pixels, and taps whose rectangles are equal (away from the border) are worked off
// together.
struct WgradPlan {
  int64_t pixel, x_row, x_channel, grad_row, grad_channel;  // strides of the tensors, in floats
  int64_t band_channels, bands;                             // input channels at a time
  int64_t tile_h, tile_w, tiles_y, tiles_x, tiles;          // output pixels at a time
  int64_t taps, keys;  // keys: the taps, or 1 if all rectangles are always equal
  int64_t parts;       // separate partial sums

  // Taps of one image column are neighbours: away from the upper and lower border their rectangles
  // are equal.
  int64_t key(const ConvGeometry& g, int64_t tap) const {
    return keys == 1 ? 0 : tap % g.kw * g.kh + tap / g.kw;
  }
  // Pixels by which a tap shifts the input of an output pixel.
  int64_t tap_shift(const ConvGeometry& g, int64_t tap) const {
    return (tap / g.kw * g.dil_h - g.pad_top) * g.in_w + tap % g.kw * g.dil_w - g.pad_left;
  }
  WgradTile locate(const ConvGeometry& g, int64_t index) const;
  // Fills `regions` [keys] with the rectangles of a tile; returns how many there are.
  int64_t list_regions(const ConvGeometry& g, const WgradTile& t, KeyRegion* regions) const;
  KeyRegion region(const ConvGeometry& g, const WgradTile& t, int64_t key) const;
};

// `bh`: rows of a block; `per_row`: mean number of stored elements per row of the matrix. Throws
// std::invalid_argument if a band of channels is beyond 32-bit offsets.
WgradPlan plan_wgrad(const ConvGeometry& g, int64_t bh, double per_row, Variant variant);

// A number that tells plans apart.
uint64_t plan_print(const WgradPlan& plan);

}  // namespace SK_ISA
}  // namespace sk
