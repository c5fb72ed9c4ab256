// Which stored columns the weight gradient works off together.
#pragma once

#include "wgrad_plan.h"

namespace sk {
namespace SK_ISA {

// A pattern cut in segments of rows (groups) and columns (taps and groups), see kernels.h.
struct PatternView {
  const int32_t *crow, *col;
  int64_t bh, bw;
  int64_t seg_rows, seg_cols;      // rows and columns of a segment
  int64_t row_blocks, col_blocks;  // blocks of a segment
  int64_t block_rows;
};

// The stored columns (bw per block), ordered by (band of channels, block row, key); a key is the
// taps that share a rectangle of pixels. Partial sums are kept in this order, [column][bh], so that
// one sweep over the rows reads and writes memory from front to back.
//
// With one tap and bw = 1 no list is made: `offset` is col_indices, `value` is null, and the order
// is that of the pattern: (block row, band).
struct ColumnLists {
  const int32_t* offset;  // input of a column: offset * scale floats from its band's first channel
  const int32_t* value;   // index of the column's first value, relative to the block row's first
  const int32_t* bounds;  // columns of (row, band, key): [bounds[at], bounds[at + 1])
  int64_t scale;
  int64_t row_step, band_step;  // at = row * row_step + band * band_step + key

  int64_t at(int64_t row, int64_t band) const { return row * row_step + band * band_step; }
};

// True if the order of the pattern serves.
bool lists_are_pattern(const WgradPlan& plan, const PatternView& p);

// Numbers of int32 to provide for `bounds`, and for `offset` and `value` each.
int64_t bounds_count(const WgradPlan& plan, const PatternView& p);
int64_t list_count(const WgradPlan& plan, const PatternView& p);

ColumnLists make_lists(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g,
                       int32_t* bounds, int32_t* offset, int32_t* value, int threads);

}  // namespace SK_ISA
}  // namespace sk
