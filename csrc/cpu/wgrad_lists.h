// Which stored columns the weight gradient works off together.
#pragma once

#include "scratch.h"
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

// Where lists lie in one block of memory; what with_lists (product_lists.h) keeps.
struct ColumnArrays {
  int32_t *bounds, *offset, *value;
};
struct ColumnSizes {
  int64_t bounds, list;
  size_t list_bytes() const { return ScratchLease::padded(size_t(list) * 4); }
  size_t bytes() const { return ScratchLease::padded(size_t(bounds) * 4) + 2 * list_bytes(); }
  ColumnArrays at(void* block) const {
    char* const lists = static_cast<char*>(block) + ScratchLease::padded(size_t(bounds) * 4);
    return {static_cast<int32_t*>(block), reinterpret_cast<int32_t*>(lists),
            reinterpret_cast<int32_t*>(lists + list_bytes())};
  }
};

ColumnSizes column_sizes(const WgradPlan& plan, const PatternView& p);
void fill_lists(const WgradPlan& plan, const PatternView& p, const ConvGeometry& g,
                const ColumnArrays& arrays, int threads);
// What filled arrays say, of the pattern that they were filled from.
ColumnLists view_lists(const WgradPlan& plan, const PatternView& p, const ColumnArrays& arrays);

}  // namespace SK_ISA
}  // namespace sk
