#include "wgrad_lists.h"

namespace sk {
namespace SK_ISA {
namespace {

// First entry of [begin, end) whose block column is not below `bound`; segments are short.
SK_INLINE int64_t first_from(const int32_t* col, int64_t begin, int64_t end, int64_t bound) {
  while (end - begin > 64) {
    const int64_t middle = begin + (end - begin) / 2;
    if (col[middle] < bound) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  while (begin < end && col[begin] < bound) ++begin;
  return begin;
}

// Calls visit(tap, band, begin, end) for each run of blocks of one tap whose first channels lie in
// one band.
template <class Visit>
SK_INLINE void walk_segments(const WgradPlan& plan, const PatternView& p, int64_t taps, int64_t row,
                             Visit visit) {
  const int64_t first = p.first_channel(row), last = first + p.seg_cols - 1;
  const int64_t band0 = first / plan.band_channels, band1 = last / plan.band_channels + 1;
  const int64_t row_end = p.crow[row + 1];
  int64_t begin = p.crow[row];
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t band = band0; band < band1; ++band) {
      int64_t bound = (tap + 1) * p.col_blocks;
      if (band + 1 < band1)
        bound = tap * p.col_blocks + ceil_div((band + 1) * plan.band_channels - first, p.bw);
      const int64_t end = first_from(p.col, begin, row_end, bound);
      visit(tap, band, begin, end);
      begin = end;
    }
  }
}

}  // namespace

bool lists_are_pattern(const WgradPlan& plan, const PatternView& p) {
  return plan.taps == 1 && p.bw == 1;
}

void list_columns(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g, int64_t row,
                  int32_t* offset, int32_t* value, int32_t* keys) {
  std::memset(keys, 0, size_t(plan.keys + 1) * 4);
  // A block has as many columns as lie inside its segment; only the segment's last can be partial.
  const int64_t short_by = p.col_blocks * p.bw - p.seg_cols;
  walk_segments(plan, p, plan.taps, row,
                [&](int64_t tap, int64_t band, int64_t begin, int64_t end) {
                  if (begin == end) return;
                  const bool partial = p.col[end - 1] == (tap + 1) * p.col_blocks - 1;
                  keys[plan.key(g, band, tap) + 1] +=
                      int32_t((end - begin) * p.bw - (partial ? short_by : 0));
                });
  for (int64_t k = 0; k < plan.keys; ++k) keys[k + 1] += keys[k];
  if (!offset) return;
  walk_segments(plan, p, plan.taps, row,
                [&](int64_t tap, int64_t band, int64_t begin, int64_t end) {
                  int32_t at = keys[plan.key(g, band, tap)];
                  const int64_t base = plan.tap_offset(g, tap) +
                                       (p.first_channel(row) - band * plan.band_channels -
                                        tap * p.col_blocks * p.bw) *
                                           plan.tile.pitch;
                  for (int64_t e = begin; e < end; ++e) {
                    const int64_t start = p.col[e] * p.bw;
                    const int64_t width =
                        imin(p.bw, tap * p.col_blocks * p.bw + p.seg_cols - start);
                    for (int64_t c = 0; c < width; ++c, ++at) {
                      offset[at] = int32_t(base + (start + c) * plan.tile.pitch);
                      value[at] = int32_t((e - p.crow[row]) * p.bh * p.bw + c);
                    }
                  }
                  keys[plan.key(g, band, tap)] = at;
                });
  for (int64_t k = plan.keys; k > 0; --k)
    keys[k] = keys[k - 1];  // filling moved every start to its end
  keys[0] = 0;
}

}  // namespace SK_ISA
}  // namespace sk
