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

  int64_t first_channel(int64_t row) const { return row / row_blocks * seg_cols; }
  int64_t first_column(int64_t row) const { return int64_t(crow[row]) * bw; }
};

// The stored columns (bw per block) of each block row, ordered by key: (band of channels, taps that
// share a rectangle of pixels). Partial sums are kept in this order, [column][bh].
//
// With one tap and bw = 1 the order is that of the pattern: `offset` is then col_indices itself,
// `scale` the pitch of a channel, and `value` null.
struct ColumnLists {
  const int32_t* offset;  // input of a column in the tile: offset * scale + base(row, band)
  const int32_t* value;   // index of the column's first value, relative to the block row's first
  const int32_t* keys;    // [block_rows][keys + 1]: where the columns of each key start
  int64_t scale;
};

// True if the lists need no arrays but `keys`.
bool lists_are_pattern(const WgradPlan& plan, const PatternView& p);

// Fills the arrays for one block row. `offset` and `value` are null where lists_are_pattern; they
// point to the row's first column else.
void list_columns(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g, int64_t row,
                  int32_t* offset, int32_t* value, int32_t* keys);

}  // namespace SK_ISA
}  // namespace sk
