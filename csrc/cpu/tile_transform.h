// Transforms of the tiles of a 3x3 weight gradient: F(3x3, 2x2) of Winograd's minimal filtering
// (S. Winograd, Arithmetic Complexity of Computations, 1980; Lavin & Gray, arXiv 1509.09308, use
// the same algorithms for forward convolutions).
//
// In one dimension the three sums y_k = x_k g_0 + x_(k+1) g_1 take four products, not six:
//
//   (x0 - x2) g0,   (x1 + x2)(g0 + g1) / 2,   (x2 - x1)(g0 - g1) / 2,   (x3 - x1) g1
//
// with y_0 = the first three added, y_1 = second - third, y_2 = second + third + fourth. Sums over
// tiles commute with that last step, which therefore runs once, on the finished sums. All factors
// are 1, but for the halves, which are exact: rounding is that of a direct sum but for a small
// factor.
#pragma once

#include "dot_sums.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {

constexpr int kSide = 4;  // products per dimension, and the pixels a tile of the input spans
constexpr int kStep = 2;  // pixels of the gradient that a tile covers, per dimension

// Pixels of a tile, each `count` floats of the batch, in rows of the image; outside of it: zeros.
struct TilePixels {
  const float* at[kSide][kSide];
};

template <bool Whole>
SK_INLINE Vec load_lanes(const float* p, int64_t left) {
  return Whole ? vload(p) : vload_part(p, left);
}

// Line `line` of the input's transform, and in it all four columns: to[q * plane].
template <int Line, bool Whole>
SK_INLINE void input_line(float* to, int64_t plane, const TilePixels& tile, int64_t n,
                          int64_t left) {
  constexpr int kFirst[kSide] = {0, 1, 2, 3}, kSecond[kSide] = {2, 2, 1, 1};
  Vec row[kSide];
  SK_UNROLL
  for (int j = 0; j < kSide; ++j) {
    const Vec a = load_lanes<Whole>(tile.at[kFirst[Line]][j] + n, left);
    const Vec b = load_lanes<Whole>(tile.at[kSecond[Line]][j] + n, left);
    row[j] = Line == 1 ? vadd(a, b) : vsub(a, b);
  }
  vstore(to + n, vsub(row[0], row[2]));
  vstore(to + n + plane, vadd(row[1], row[2]));
  vstore(to + n + 2 * plane, vsub(row[2], row[1]));
  vstore(to + n + 3 * plane, vsub(row[3], row[1]));
}

// The same of the gradient, whose tile is the first kStep rows and columns of `tile`.
template <int Line, bool Whole>
SK_INLINE void gradient_line(float* to, int64_t plane, const TilePixels& tile, int64_t n,
                             int64_t left) {
  Vec row[kStep];
  SK_UNROLL
  for (int j = 0; j < kStep; ++j) {
    if (Line == 0 || Line == 3) {
      row[j] = load_lanes<Whole>(tile.at[Line == 3][j] + n, left);
      continue;
    }
    const Vec a = load_lanes<Whole>(tile.at[0][j] + n, left);
    const Vec b = load_lanes<Whole>(tile.at[1][j] + n, left);
    row[j] = Line == 1 ? vadd(a, b) : vsub(a, b);
  }
  vstore(to + n, row[0]);
  vstore(to + n + plane, vadd(row[0], row[1]));
  vstore(to + n + 2 * plane, vsub(row[0], row[1]));
  vstore(to + n + 3 * plane, row[1]);
}

// One line of one tile for `count` floats of the batch, then zeros up to `lanes`, a multiple of
// kLanes.
template <bool Input, int Line>
void transform_line(float* to, int64_t plane, const TilePixels& tile, int64_t count,
                    int64_t lanes) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    if (Input)
      input_line<Line, true>(to, plane, tile, n, kLanes);
    else
      gradient_line<Line, true>(to, plane, tile, n, kLanes);
  }
  if (n < count) {
    if (Input)
      input_line<Line, false>(to, plane, tile, n, count - n);
    else
      gradient_line<Line, false>(to, plane, tile, n, count - n);
    n += kLanes;
  }
  for (; n < lanes; n += kLanes) {
    SK_UNROLL
    for (int q = 0; q < kSide; ++q) vstore(to + n + q * plane, vzero());
  }
}

// The three sums of a line from its four products, for n sums side by side: y[k * to_step].
template <int N>
SK_INLINE void sums_of_products(float* y, int to_step, const float* m, int from_step) {
  for (int e = 0; e < N; ++e) {
    const float both = .5f * (m[from_step + e] + m[2 * from_step + e]);
    y[e] = m[e] + both;
    y[to_step + e] = .5f * (m[from_step + e] - m[2 * from_step + e]);
    y[2 * to_step + e] = both + m[3 * from_step + e];
  }
}

}  // namespace SK_ISA
}  // namespace sk
