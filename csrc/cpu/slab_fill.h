// How a slab moves through an image: located, filled, slid, and fetched ahead of its turn.
#pragma once

#include "long_rows.h"
#include "sparse_product.h"

namespace sk {
namespace SK_ISA {

// Output rows [i0, i0 + rows) of a strip [j0, j0 + cols) and the image rows [y0, y1) they read.
struct Slab {
  int64_t n0, j0, cols, i0, rows, y0, y1;
};

inline void locate_rows(const Product& p, Slab& t, int64_t i0, int64_t rows) {
  t.i0 = i0;
  t.rows = rows;
  const int64_t top = i0 * p.step_y + p.dy_first;
  const int64_t bottom = top + (rows - 1) * p.step_y + (p.segments - 1) * p.dy_step;
  t.y0 = imin(imax<int64_t>(top, 0), p.src.height);
  t.y1 = imax(t.y0, imin(bottom + 1, p.src.height));
}

// Whether some output row reads image row y: with a vertical step beyond the taps, some do not.
inline bool row_is_read(const Product& p, int64_t y) {
  if (p.step_y == 1) return true;
  for (int64_t s = 0; s < p.segments; ++s)
    if ((y - p.dy_first - s * p.dy_step) % p.step_y == 0) return true;
  return false;
}

// How far gapless packing fetches ahead. 1 and 2 were up to 30 % slower with 256 channels.
constexpr int64_t kChannelsAhead = 4;

// Brings the slab from image rows [y0, old.y1) to [t.y0, t.y1); `old.y1` <= t.y0 packs all of it.
inline void fill_slab(const Product& p, const ProductPlan& plan, const Slab& old, const Slab& t,
                      float* tile) {
  const SlabShape& s = plan.slab;
  const int64_t kept = imax<int64_t>(0, old.y1 - t.y0);
  const int64_t shift = t.y0 - old.y0;
  const int64_t valid = imin<int64_t>(s.lanes, p.src.batch - t.n0);
  const int64_t x0 = t.j0 * p.step_x + p.dx_first;
  const float* source = p.src.data + t.n0;
  const int64_t image = p.src.height * p.src.width * p.src.batch;
  for (int64_t c = 0; c < p.src_channels; ++c) {
    float* channel = tile + c * s.pitch;
    if (kept > 0 && shift > 0)
      std::memmove(channel, channel + shift * s.row_pitch, size_t(kept * s.row_pitch) * 4);
    for (int64_t y = t.y0 + kept; y < t.y1; ++y) {
      if (!row_is_read(p, y)) continue;
      const float* row = source + (c * p.src.height + y) * p.src.width * p.src.batch;
      if (plan.gapless) {
        const int64_t ahead = imin(p.src_channels - 1 - c, kChannelsAhead) * image;
        pack_gapless(channel + (y - t.y0) * s.row_pitch, s, row, p.src.width, x0, ahead);
        continue;
      }
      pack_row(channel + (y - t.y0) * s.row_pitch, s, row, p.src.width, p.src.batch, x0, valid);
    }
  }
}

// Fetches what the next slab will pack into the second-level cache while this one computes: the
// packing otherwise waits for memory, one short piece of a line after the other.
class Ahead {
 public:
  Ahead() = default;
  // Image rows [y0, y1) of the slab's columns and lanes; all of it over `turns` calls of fetch().
  Ahead(const Product& p, const ProductPlan& plan, const Slab& t, int64_t y0, int64_t turns) {
    const int64_t x0 = imax<int64_t>(0, t.j0 * p.step_x + p.dx_first);
    const int64_t x1 = imin(p.src.width, (t.j0 + t.cols - 1) * p.step_x + p.dx_last + 1);
    if (y0 >= t.y1 || x0 >= x1) return;
    at_ = p.src.data + (y0 * p.src.width + x0) * p.src.batch + t.n0;
    pixel_ = p.src.batch;
    pixels_ = x1 - x0;
    row_ = p.src.width * p.src.batch;
    rows_ = t.y1 - y0;
    channel_ = p.src.height * row_;
    channels_ = p.src_channels;
    floats_ = imin<int64_t>(plan.slab.lanes, p.src.batch - t.n0);
    per_turn_ = ceil_div(channels_ * rows_ * pixels_, imax<int64_t>(1, turns));
  }

  void fetch() {
    for (int64_t n = imin(per_turn_, channels_ > c_ ? per_turn_ : 0); n > 0; --n) {
      const float* line = at_ + c_ * channel_ + y_ * row_ + x_ * pixel_;
      for (int64_t f = 0; f < floats_; f += 16) __builtin_prefetch(line + f, 0, 2);
      if (++x_ < pixels_) continue;
      x_ = 0;
      if (++y_ < rows_) continue;
      y_ = 0;
      if (++c_ == channels_) return;
    }
  }

 private:
  const float* at_ = nullptr;
  int64_t pixel_ = 0, pixels_ = 0, row_ = 0, rows_ = 0, channel_ = 0, channels_ = 0, floats_ = 0;
  int64_t per_turn_ = 0, x_ = 0, y_ = 0, c_ = 0;
};

}  // namespace SK_ISA
}  // namespace sk
