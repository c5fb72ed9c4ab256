// A packed tile: a window of a feature-major activation for some lanes of the batch,
// [channel][row][column][lanes].
//
// Why pack: in [channel][row][column][batch] the channels of a pixel lie a power of two apart, so
// they share a few cache sets and evict each other. Packed, the working set is contiguous, padding
// is zeros in memory (no test in the inner loop), and a channel's pitch is an odd number of cache
// lines.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

struct TileShape {
  int lanes;              // batch entries of a tile, a multiple of kLanes
  int64_t height, width;  // rows and columns stored, border included
  int64_t row_pitch;      // floats from row to row
  int64_t pitch;          // floats from channel to channel
};

// channels x [height, width] x lanes; `pitch` is odd in cache lines so that channels spread over
// all cache sets.
SK_INLINE TileShape tile_shape(int lanes, int64_t height, int64_t width) {
  TileShape s{lanes, height, width, width * lanes, 0};
  const int64_t lines = ceil_div(height * s.row_pitch, 16);
  s.pitch = (lines | 1) * 16;
  return s;
}

struct TileSource {
  const float* data;  // [channels][height][width][batch]
  int64_t height, width, batch;
};

SK_INLINE void zero_floats(float* dst, int64_t n) {
  std::memset(dst, 0, size_t(n) * sizeof(float));
}

// `pixels` consecutive pixels of one image row, `lanes` of each; lanes past the end of the batch
// become zero.
SK_INLINE void pack_pixels(float* dst, const float* src, int64_t pixels, int64_t batch, int lanes,
                           int64_t valid) {
  if (valid >= lanes) {
    for (int64_t p = 0; p < pixels; ++p, dst += lanes, src += batch)
      for (int v = 0; v < lanes; v += kLanes) vstore(dst + v, vload(src + v));
    return;
  }
  for (int64_t p = 0; p < pixels; ++p, dst += lanes, src += batch) {
    zero_floats(dst, lanes);
    std::memcpy(dst, src, size_t(valid) * sizeof(float));
  }
}

// Packs rows [y0, y0+rows) and columns [x0, x0+s.width) of channels [c0, c0+channels), batch
// entries from n0 on. Positions outside the image become zero. `rows` <= s.height.
SK_INLINE void pack_tile(float* tile, const TileShape& s, const TileSource& src, int64_t c0,
                         int64_t channels, int64_t y0, int64_t rows, int64_t x0, int64_t n0) {
  const int64_t valid = imin<int64_t>(s.lanes, src.batch - n0);
  const int64_t left = imin(imax<int64_t>(0, -x0), s.width);      // border columns before the image
  const int64_t end = imax(left, imin(s.width, src.width - x0));  // first border column after it
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      float* dst = tile + c * s.pitch + r * s.row_pitch;
      const int64_t y = y0 + r;
      if (y < 0 || y >= src.height) {
        zero_floats(dst, s.row_pitch);
        continue;
      }
      if (left > 0) zero_floats(dst, left * s.lanes);
      if (end > left) {
        const float* from =
            src.data + (((c0 + c) * src.height + y) * src.width + x0 + left) * src.batch + n0;
        pack_pixels(dst + left * s.lanes, from, end - left, src.batch, s.lanes, valid);
      }
      if (end < s.width) zero_floats(dst + end * s.lanes, (s.width - end) * s.lanes);
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
