// The one inner kernel of the sparse products: R output rows at once, P pixels by V vectors of the
// batch in registers.
//
// A chunk is R neighbouring output rows that share their non-zeros (a block's height, decomposed in
// powers of two). Its list holds, in the order of use, one entry per non-zero column: an offset
// into the packed tile and R weights. The P pixels of a block lie side by side in the tile,
// whatever the stride (see slab.h), so that every load has a constant distance from the first.
//
// The lists are cut in bands (ranges of source channels and vertical taps) so that the part of the
// tile that one band reads for one pixel block stays in the first-level cache while all rows run
// over it. Between bands the sums wait in `sums`. Within a band entries are grouped in segments by
// the vertical tap: output rows at the image's edge skip the taps that fall outside.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

struct Chunk {
  int32_t row;    // first output row (channel)
  int32_t log_r;  // R = 1 << log_r
};

// One band of one block of P pixels.
struct RowsCall {
  const float* x;          // the tile at the first pixel, for a tap at offset 0
  const uint32_t* starts;  // [chunk][segments]: entry where each segment starts; the next ends it
  int64_t segments;        // vertical taps of a band
  int64_t seg_lo, seg_hi;  // those of them that are inside the image
  const int32_t* offsets;  // [entry]
  const float* weights;    // [entry][weight_stride], the first R of which are used
  int64_t weight_stride;
  float* sums;                   // [row][P * V * kLanes]: what earlier bands added up
  bool first, last;              // band of this pixel block: starts from zero, writes the output
  float* out;                    // output row 0 at the first pixel, first lane
  int64_t row_stride, out_step;  // floats between output rows, between neighbouring output pixels
  const float* bias;
  bool relu;
  bool stream;    // all stores are full, aligned vectors: bypass the cache
  int64_t valid;  // batch entries of the tile that exist
};

using RowsKernel = void (*)(const RowsCall&, const Chunk* chunks, int64_t begin, int64_t end);

// Entries worked on at once, each with own accumulators, where A alone would not hide the latency
// of the FMA (4 cycles, 2 a cycle).
template <int A>
struct Unroll {
  static constexpr int value = A >= 8 ? 1 : (A >= 4 ? 2 : 4);
};

// All loops over accumulators are unrolled by hand of the pragma: an array that is once indexed by
// a variable lives in memory, and every multiply-add then stores its result.
template <int R, int A>
SK_INLINE void accumulate_entry(Vec (&acc)[R][A], const float* x, const float* weights) {
  if constexpr (R == 1) {
    const Vec w = vset1(weights);
    SK_UNROLL for (int a = 0; a < A; ++a) acc[0][a] = vfma(w, vload(x + a * kLanes), acc[0][a]);
  } else {
    Vec xs[A];
    SK_UNROLL for (int a = 0; a < A; ++a) xs[a] = vload(x + a * kLanes);
    SK_UNROLL for (int r = 0; r < R; ++r) {
      const Vec w = vset1(weights + r);
      SK_UNROLL for (int a = 0; a < A; ++a) acc[r][a] = vfma(w, xs[a], acc[r][a]);
    }
  }
}

// Bias, ReLU and the store of one output row's P x V vectors.
template <int P, int V>
SK_INLINE void store_row(const RowsCall& c, Vec (&acc)[P * V], float* out, int64_t row) {
  if (c.bias) {
    const Vec bias = vset1(c.bias + row);
    SK_UNROLL for (int a = 0; a < P * V; ++a) acc[a] = vadd(acc[a], bias);
  }
  if (c.relu) {
    SK_UNROLL for (int a = 0; a < P * V; ++a) acc[a] = vrelu(acc[a]);
  }
  if (c.stream) {
    SK_UNROLL for (int p = 0; p < P; ++p) {
      SK_UNROLL for (int v = 0; v < V; ++v)
          vstream(out + p * c.out_step + v * kLanes, acc[p * V + v]);
    }
  } else if (c.valid == V * kLanes) {
    SK_UNROLL for (int p = 0; p < P; ++p) {
      SK_UNROLL for (int v = 0; v < V; ++v)
          vstore(out + p * c.out_step + v * kLanes, acc[p * V + v]);
    }
  } else {
    alignas(64) float all[P * V * kLanes];
    SK_UNROLL for (int a = 0; a < P * V; ++a) vstore(all + a * kLanes, acc[a]);
    for (int p = 0; p < P; ++p)
      std::memcpy(out + p * c.out_step, all + p * V * kLanes, size_t(c.valid) * sizeof(float));
  }
}

template <int R, int P, int V>
void rows_kernel(const RowsCall& c, const Chunk* chunks, int64_t begin, int64_t end) {
  constexpr int A = P * V;
  constexpr int U = Unroll<R * A>::value;
  // Local copies: a vector store may alias anything, so that fields of `c` would be read again.
  const float* const x = c.x;
  const int32_t* const offsets = c.offsets;
  const int64_t stride = c.weight_stride;
  const uint32_t *const lo = c.starts + c.seg_lo, *const hi = c.starts + c.seg_hi;
  const int64_t segments = c.segments;
  const bool first = c.first, last = c.last;
  for (int64_t k = begin; k < end; ++k) {
    const int32_t* entry = offsets + lo[k * segments];
    const int32_t* const stop = offsets + hi[k * segments];
    if (entry == stop && !first && !last) continue;
    const float* w = c.weights + lo[k * segments] * stride;
    const int64_t row = chunks[k].row;
    float* sums = c.sums + row * (A * kLanes);
    Vec acc[U][R][A];
    SK_UNROLL for (int u = 0; u < U; ++u) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int a = 0; a < A; ++a) acc[u][r][a] = vzero();
      }
    }
    if (!first) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int a = 0; a < A; ++a) acc[0][r][a] = vload(sums + (r * A + a) * kLanes);
      }
    }
    for (; stop - entry >= U; entry += U, w += U * stride) {
      SK_UNROLL for (int u = 0; u < U; ++u)
          accumulate_entry<R, A>(acc[u], x + entry[u], w + u * stride);
    }
    if constexpr (U > 1) {
      for (; entry < stop; ++entry, w += stride) accumulate_entry<R, A>(acc[0], x + *entry, w);
      SK_UNROLL for (int u = 1; u < U; ++u) {
        SK_UNROLL for (int r = 0; r < R; ++r) {
          SK_UNROLL for (int a = 0; a < A; ++a) acc[0][r][a] = vadd(acc[0][r][a], acc[u][r][a]);
        }
      }
    }
    if (last) {
      SK_UNROLL for (int r = 0; r < R; ++r)
          store_row<P, V>(c, acc[0][r], c.out + (row + r) * c.row_stride, row + r);
    } else {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int a = 0; a < A; ++a) vstore(sums + (r * A + a) * kLanes, acc[0][r][a]);
      }
    }
  }
}

// The kernel for 1<<log_r rows, 1<<log_p pixels, 1<<log_v vectors; null where the registers do not
// hold it.
RowsKernel rows_kernel_for(int log_r, int log_p, int log_v);

constexpr int kMaxLog = 3;  // rows, pixels and vectors go up to 8

}  // namespace SK_ISA
}  // namespace sk
