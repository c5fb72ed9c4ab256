// A slab: the window of a feature-major activation that some rows of output pixels read, packed as
// [channel][image row][column phase][column][lanes], for some lanes of the batch.
//
// Why pack: in [channel][row][column][batch] the channels of a pixel lie a power of two apart, so
// they share a few cache sets and evict each other. Packed, the working set is contiguous, columns
// outside the image are zeros in memory (no test in the inner loop), and a channel's pitch is an
// odd number of cache lines. Columns are sorted by their phase, the remainder modulo the horizontal
// step, so that neighbouring output pixels read neighbouring columns at every step. A slab slides
// down the image: rows that the next output rows read again are moved, not packed again.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

struct TileSource {
  const float* data;  // [channels][height][width][batch]
  int64_t height, width, batch;
};

struct SlabShape {
  int lanes;                 // batch entries, a multiple of kLanes
  int64_t height;            // image rows stored
  int64_t step;              // horizontal step from output pixel to output pixel
  int64_t phases;            // column phases stored: those that a tap reads, at most `step`
  int64_t width;             // columns of one phase
  int64_t row_pitch, pitch;  // floats from row to row, from channel to channel
};

// `reach`: distance between the first and the last horizontal tap. `pixels`: output pixels of a
// row.
SK_INLINE SlabShape slab_shape(int lanes, int64_t height, int64_t pixels, int64_t step,
                               int64_t reach) {
  SlabShape s{lanes, height, step, imin(step, reach + 1), pixels + reach / step, 0, 0};
  s.row_pitch = s.phases * s.width * lanes;
  s.pitch = (ceil_div(height * s.row_pitch, 16) | 1) * 16;
  return s;
}

// Floats from a channel's row to the column that the first output pixel reads at horizontal tap
// distance `dx` (0 for the first tap).
SK_INLINE int64_t slab_column(const SlabShape& s, int64_t dx) {
  return ((dx % s.step) * s.width + dx / s.step) * s.lanes;
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

// One image row of one channel: columns x0 + phase + i * step; those outside the image become zero.
SK_INLINE void pack_row(float* dst, const SlabShape& s, const float* row, int64_t width,
                        int64_t batch, int64_t x0, int64_t valid) {
  for (int64_t f = 0; f < s.phases; ++f, dst += s.width * s.lanes) {
    const int64_t first = x0 + f;  // column of i = 0
    const int64_t left = imin(s.width, first < 0 ? ceil_div(-first, s.step) : 0);
    const int64_t inside = first < width ? ceil_div(width - first, s.step) : 0;
    const int64_t end = imax(left, imin(s.width, inside));
    if (left > 0) zero_floats(dst, left * s.lanes);
    if (end > left) {
      pack_pixels(dst + left * s.lanes, row + (first + left * s.step) * batch, end - left,
                  batch * s.step, s.lanes, valid);
    }
    if (end < s.width) zero_floats(dst + end * s.lanes, (s.width - end) * s.lanes);
  }
}

// `floats` (a multiple of a vector) that lie without gaps; meanwhile fetches what `ahead` points
// to: the hardware's prefetching ends with each channel's short run.
SK_INLINE void pack_run(float* dst, const float* src, int64_t floats, const float* ahead) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < floats; i += kLine) {
    __builtin_prefetch(ahead + i, 0, 3);
    SK_UNROLL for (int64_t v = 0; v < kLine; v += kLanes) vstore(dst + i + v, vload(src + i + v));
  }
}

// pack_row of a slab that takes whole pixels of one cache line at a horizontal step of 1.
// `channels_ahead`: floats to the row that a later call packs.
SK_INLINE void pack_gapless(float* dst, const SlabShape& s, const float* row, int64_t width,
                            int64_t x0, int64_t channels_ahead) {
  const int64_t left = imin(s.width, imax<int64_t>(0, -x0));
  const int64_t end = imax(left, imin(s.width, width - x0));
  if (left > 0) zero_floats(dst, left * s.lanes);
  const float* from = row + (x0 + left) * s.lanes;
  pack_run(dst + left * s.lanes, from, (end - left) * s.lanes, from + channels_ahead);
  if (end < s.width) zero_floats(dst + end * s.lanes, (s.width - end) * s.lanes);
}

}  // namespace SK_ISA
}  // namespace sk
