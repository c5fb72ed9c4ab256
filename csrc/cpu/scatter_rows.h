// The inner kernel of the input gradient of V x 1 blocks: it scatters where rows_kernel gathers.
//
// A V x 1 block connects one output row of this product with V neighbouring source channels, so a
// gathering kernel loads V source vectors for every V multiply-adds and shares nothing. All blocks
// of one source block and one tap read the same V channels, though. Here those stay in registers
// while the run of output rows that they reach is added up in the first-level cache: one load and
// one store of a sum per V multiply-adds.
//
// Lists are cut in bands of output rows, whose sums fit that cache, and in segments by the vertical
// tap, as in rows_kernel.
#pragma once

#include "sparse_rows.h"

namespace sk {
namespace SK_ISA {

// The baseline's registers hold too little to gain: it gathers.
constexpr bool kCanScatter = kLanes >= 8;
// log2 of a pixel block's vectors, at most: kMaxGroup times as many are held.
constexpr int kScatterLog = 1;
constexpr int kGroupLogs = 3;  // source channels at once: 1, 2 or 4
constexpr int kMaxGroup = 1 << (kGroupLogs - 1);

// `count` output rows reached from the same source channels by the same tap.
struct SourceRun {
  int32_t offset;  // into the slab: first channel, shifted by the tap
  int32_t count;
};

// Slots are [band][segment][log2 of the group].
struct ScatterLists {
  int64_t band_rows, bands, segments;
  uint32_t* runs_at;     // [slot + 1]: first run
  uint32_t* entries_at;  // [slot + 1]: first entry
  SourceRun* runs;
  int32_t* rows;     // [entry]: floats from the band's first sum
  int32_t* sources;  // [entry]: index of its first weight in the pattern's values
  int64_t slots() const { return bands * segments * kGroupLogs; }
};

// Where a kernel stands in the lists.
struct ScatterCursor {
  const int32_t* rows;
  const float* weights;
};

// Adds runs [run, end) to the sums. `x`: the slab at the first pixel, for a tap at offset 0;
// `pitch`: floats from channel to channel; `stride`: weights per entry.
using ScatterKernel = void (*)(const float* x, int64_t pitch, const SourceRun* run,
                               const SourceRun* end, ScatterCursor& at, int64_t stride,
                               float* sums);

template <int G, int A>
void scatter_kernel(const float* x, int64_t pitch, const SourceRun* run, const SourceRun* end,
                    ScatterCursor& at, int64_t stride, float* sums) {
  const int32_t* rows = at.rows;
  const float* w = at.weights;
  for (; run != end; ++run) {
    Vec xs[G][A];
    SK_UNROLL for (int g = 0; g < G; ++g) {
      SK_UNROLL for (int a = 0; a < A; ++a) xs[g][a] =
          vload(x + run->offset + g * pitch + a * kLanes);
    }
    for (const int32_t* const stop = rows + run->count; rows != stop; ++rows, w += stride) {
      float* to = sums + *rows;
      Vec acc[A];
      SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vload(to + a * kLanes);
      SK_UNROLL for (int g = 0; g < G; ++g) {
        const Vec weight = vset1(w + g);
        SK_UNROLL for (int a = 0; a < A; ++a) acc[a] = vfma(weight, xs[g][a], acc[a]);
      }
      SK_UNROLL for (int a = 0; a < A; ++a) vstore(to + a * kLanes, acc[a]);
    }
  }
  at.rows = rows;
  at.weights = w;
}

// Writes the sums of output rows [begin, end) and clears them for the next pixel block.
using ScatterStore = void (*)(const RowsCall&, float* sums, int64_t begin, int64_t end);

template <int P, int V>
void scatter_store(const RowsCall& c, float* sums, int64_t begin, int64_t end) {
  constexpr int A = P * V;
  for (int64_t row = begin; row < end; ++row, sums += A * kLanes) {
    Vec acc[A];
    SK_UNROLL for (int a = 0; a < A; ++a) {
      acc[a] = vload(sums + a * kLanes);
      vstore(sums + a * kLanes, vzero());
    }
    store_row<P, V>(c, acc, c.out + row * c.row_stride, row);
  }
}

// For groups of 1 << log_g channels and blocks of 1 << log_a vectors.
SK_INLINE ScatterKernel scatter_kernel_for(int log_g, int log_a) {
  static const ScatterKernel all[kGroupLogs][kScatterLog + 1] = {
      {&scatter_kernel<1, 1>, &scatter_kernel<1, 2>},
      {&scatter_kernel<2, 1>, &scatter_kernel<2, 2>},
      {&scatter_kernel<4, 1>, &scatter_kernel<4, 2>}};
  return all[log_g][log_a];
}

// For 1 << log_p pixels of 1 << log_v vectors.
SK_INLINE ScatterStore scatter_store_for(int log_p, int log_v) {
  if (log_p == 0 && log_v == 0) return &scatter_store<1, 1>;
  return log_p == 0 ? &scatter_store<1, 2> : &scatter_store<2, 1>;
}

}  // namespace SK_ISA
}  // namespace sk
