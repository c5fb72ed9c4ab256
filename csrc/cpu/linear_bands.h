// Where the bands of a linear layer's sources begin in each line of its pattern.
//
// A product reads the rows of its dense operand in the order of a line's indices, that is at
// random. Indices are sorted within a line, so one table of bounds cuts all lines at the same
// sources, and what the lines read in one band stays in the second-level cache. No list is made:
// the pattern's own arrays are read as they are.
#pragma once

#include "../kernels.h"
#include "pattern_check.h"
#include "scratch.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {

// One side of a pattern: (crow, col), or (t_crow, t_row).
struct Lines {
  const int32_t *starts, *index;
  int64_t count, bound;    // lines; indices are below `bound`
  int64_t bands, width;    // of indices, in each but the last
  const int32_t *lo, *hi;  // band b of line i: [lo[i * step + b], hi[i * step + b])
  int64_t step;
  int band_log;  // bands of 2^band_log times the bytes

  int64_t entries() const { return starts[count]; }
};

// The pattern unless the cache vouches for it; `lines.lo` may be null then. Throws as
// check_pattern.
void check_lines(const Lines& lines, const PatternArrays& arrays, int64_t capacity,
                 ListCache* cache, int64_t kernel, int threads);

// Cuts lines in bands of at most `band_bytes`, where `index_bytes` are read for one index, and of
// at least kLeastEntries on average.
void plan_bands(Lines& lines, int64_t index_bytes, int64_t band_bytes);

// Bytes of scratch that find_bands may need.
size_t bands_scratch(const Lines& lines);

// Sets lo, hi and step, from the cache if there is one. All bands but the last of a line hold a
// multiple of `multiple` entries: a few entries more are read from the next band, and no group of
// them is left incomplete before the line's end.
void find_bands(Lines& lines, int64_t multiple, ListCache* cache, int64_t kernel,
                ScratchLease& lease, int threads);

// First line with at least `split / splits` of the entries before it.
int64_t split_line(const Lines& lines, int64_t split, int64_t splits);

}  // namespace SK_ISA
}  // namespace sk
