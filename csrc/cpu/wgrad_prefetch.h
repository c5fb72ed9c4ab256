// Asks for the next tile while the present one is computed with: packing reads short pieces far
// apart, which no hardware prefetcher foresees.
#pragma once

#include "tile.h"

namespace sk {
namespace SK_ISA {

// A window of an activation that pack_tile will read: see there.
struct TileWindow {
  TileSource source;
  int64_t c0, channels, y0, rows, x0, width, n0, lanes;
};

// `n` neighbouring words of 4 bytes.
template <class Word>
SK_INLINE void prefetch_words(const Word* p, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, 0, 3);
#else
  (void)p, (void)n;
#endif
}

// Channels [begin, end) of the window, counted from its first.
SK_INLINE void prefetch_window(const TileWindow& w, int64_t begin, int64_t end) {
  const int64_t y0 = imax<int64_t>(0, w.y0), y1 = imin(w.source.height, w.y0 + w.rows);
  const int64_t x0 = imax<int64_t>(0, w.x0), x1 = imin(w.source.width, w.x0 + w.width);
  const int64_t lanes = imin(w.lanes, w.source.batch - w.n0);
  for (int64_t c = w.c0 + begin; c < w.c0 + end; ++c)
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; ++x)
        prefetch_words(
            w.source.data + ((c * w.source.height + y) * w.source.width + x) * w.source.batch + w.n0,
            lanes);
}

}  // namespace SK_ISA
}  // namespace sk
