// The inner kernel for output rows with few non-zeros: one output row at a time over a long run of
// contiguous floats.
//
// rows_kernel keeps one pixel block in the first-level cache while all rows run over it. With a
// handful of non-zeros per row there is nothing to keep: what costs is starting a row for every
// block, and output that is written in short pieces all over memory. Here a row's non-zeros stay
// and the pixels run, so that its output is written from front to back.
#pragma once

#include "sparse_rows.h"

namespace sk {
namespace SK_ISA {

// A vectors of one output row. Each sum runs over the non-zeros in order, whatever A is: where a
// run is cut has no influence on the result.
template <int A>
SK_INLINE void row_block(const RowsCall& c, const int32_t* entry, const int32_t* stop,
                         const float* w, const float* x, float* out, int64_t row) {
  Vec acc[A];
  SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vzero();
  for (; entry < stop; ++entry, ++w) {
    const float* from = x + *entry;
    const Vec weight = vset1(w);
    SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vfma(weight, vload(from + a * kLanes), acc[a]);
  }
  if (c.bias) {
    const Vec bias = vset1(c.bias + row);
    SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vadd(acc[a], bias);
  }
  if (c.relu) {
    SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vrelu(acc[a]);
  }
  if (c.stream) {
    SK_UNROLL for (int a = 0; a < A; ++a) vstream(out + a * kLanes, acc[a]);
  } else {
    SK_UNROLL for (int a = 0; a < A; ++a) vstore(out + a * kLanes, acc[a]);
  }
}

// `floats` of chunk k's single output row, a multiple of kLongStep; x and out as in RowsCall.
constexpr int kLongStep = 16;

SK_INLINE void long_row(const RowsCall& c, const Chunk* chunks, int64_t k, int64_t floats) {
  const uint32_t lo = c.starts[k * c.segments + c.seg_lo];
  const int32_t* const entry = c.offsets + lo;
  const int32_t* const stop = c.offsets + c.starts[k * c.segments + c.seg_hi];
  const float* const w = c.weights + lo;
  const int64_t row = chunks[k].row;
  const float* const x = c.x;
  float* const out = c.out + row * c.row_stride;
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= floats; i += kAccumulators * kLanes)
    row_block<kAccumulators>(c, entry, stop, w, x + i, out + i, row);
  constexpr int kFew = kAccumulators / 4;
  for (; i + kFew * kLanes <= floats; i += kFew * kLanes)
    row_block<kFew>(c, entry, stop, w, x + i, out + i, row);
  for (; i < floats; i += kLongStep)
    row_block<kLongStep / kLanes>(c, entry, stop, w, x + i, out + i, row);
}

}  // namespace SK_ISA
}  // namespace sk
