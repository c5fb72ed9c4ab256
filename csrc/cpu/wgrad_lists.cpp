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
  const int64_t first = row / p.row_blocks * p.seg_cols, last = first + p.seg_cols - 1;
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

// Counts the columns of one block row into bounds[at + 1].
void count_columns(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g, int64_t row,
                   const ColumnLists& lists, int32_t* bounds) {
  // Only the last block of a segment can be partial: then it has so many columns less.
  const int64_t missing = p.col_blocks * p.bw - p.seg_cols;
  walk_segments(plan, p, plan.taps, row,
                [&](int64_t tap, int64_t band, int64_t begin, int64_t end) {
                  if (begin == end) return;
                  const bool partial = p.col[end - 1] == (tap + 1) * p.col_blocks - 1;
                  bounds[lists.at(row, band) + plan.key(g, tap) + 1] +=
                      int32_t((end - begin) * p.bw - (partial ? missing : 0));
                });
}

// Fills the lists of one block row; bounds[at + 1] holds the start of `at` before, the end after.
void fill_columns(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g, int64_t row,
                  const ColumnLists& lists, int32_t* bounds, int32_t* offset, int32_t* value) {
  const int64_t image = g.in_h * g.in_w, first = row / p.row_blocks * p.seg_cols;
  walk_segments(
      plan, p, plan.taps, row, [&](int64_t tap, int64_t band, int64_t begin, int64_t end) {
        int32_t* bound = bounds + lists.at(row, band) + plan.key(g, tap) + 1;
        int32_t at = *bound;
        const int64_t tap_column = tap * p.col_blocks * p.bw;
        const int64_t shift =
            plan.tap_shift(g, tap) + (first - band * plan.band_channels - tap_column) * image;
        for (int64_t e = begin; e < end; ++e) {
          const int64_t column = p.col[e] * p.bw;
          const int64_t width = imin(p.bw, tap_column + p.seg_cols - column);
          for (int64_t c = 0; c < width; ++c, ++at) {
            offset[at] = int32_t(shift + (column + c) * image);
            value[at] = int32_t((e - p.crow[row]) * p.bh * p.bw + c);
          }
        }
        *bound = at;
      });
}

}  // namespace

bool lists_are_pattern(const WgradPlan& plan, const PatternView& p) {
  return plan.taps == 1 && p.bw == 1;
}

ColumnSizes column_sizes(const WgradPlan& plan, const PatternView& p) {
  return {p.block_rows * (plan.bands * plan.keys + 1) + 1,
          lists_are_pattern(plan, p) ? 0 : p.crow[p.block_rows] * p.bw};
}

ColumnLists view_lists(const WgradPlan& plan, const PatternView& p, const ColumnArrays& arrays) {
  if (lists_are_pattern(plan, p))
    return {p.col, nullptr, arrays.bounds, plan.x_channel, plan.bands + 1, 1};
  return {arrays.offset, arrays.value, arrays.bounds,
          plan.pixel,    plan.keys,    p.block_rows * plan.keys};
}

void fill_lists(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g,
                const ColumnArrays& arrays, int threads) {
  int32_t* const bounds = arrays.bounds;
  if (lists_are_pattern(plan, p)) {
    const int64_t step = plan.bands + 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < p.block_rows; ++row) {
      for (int64_t band = 0; band < step; ++band) bounds[row * step + band] = p.crow[row];
      walk_segments(plan, p, 1, row, [&](int64_t, int64_t band, int64_t, int64_t end) {
        for (int64_t b = band + 1; b < step; ++b) bounds[row * step + b] = int32_t(end);
      });
    }
    return;
  }
  const ColumnLists lists = view_lists(plan, p, arrays);
  const int64_t all = p.block_rows * plan.bands * plan.keys;
  std::memset(bounds, 0, size_t(all + 1) * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p.block_rows; ++row) count_columns(plan, p, g, row, lists, bounds);
  int32_t sum = 0;
  for (int64_t i = 1; i <= all; ++i) {
    const int32_t count = bounds[i];
    bounds[i] = sum;
    sum += count;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p.block_rows; ++row)
    fill_columns(plan, p, g, row, lists, bounds, arrays.offset, arrays.value);
}

}  // namespace SK_ISA
}  // namespace sk
