// What the launchers refuse before they touch a pattern or a shape: both would otherwise end in
// reads and writes outside the arrays. Compiled once, for no instruction set: only here do errors
// build strings.
#pragma once

#include "../kernels.h"

namespace sk {

// Offsets and sorted indices of one side of a pattern: (crow, col), or (t_crow, t_row, t_perm).
struct PatternArrays {
  const char *starts_name, *index_name;  // as SparsityPattern calls them
  const int32_t* starts;                 // [lines + 1]
  const int32_t* index;                  // strictly increasing within a line, in [0, bound)
  const int32_t* perm;                   // in [0, capacity), or null
  int64_t lines, bound;
};

// Throws std::invalid_argument that names the array and the first wrong position. One pass over the
// integers; reads nothing past `capacity` whatever the arrays hold.
void check_pattern(const PatternArrays& p, int64_t capacity, int threads);

// Throws std::invalid_argument that names the shape, if a packed tile of `floats` is beyond the
// 32-bit offsets of the lists.
void check_tile(double floats, const ConvGeometry& g);

}  // namespace sk
