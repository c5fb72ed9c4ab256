// The one inner kernel of the sparse products: R output rows at once, P pixels by V vectors of the
// batch in registers.
//
// A chunk is R neighbouring output rows that share their non-zeros (a block's height, decomposed in
// powers of two). Its list holds, in the order of use, one entry per non-zero column: [offset into
// the packed tile, R weights], 1 + R words. Entries are grouped in segments by the vertical tap, so
// that output rows at the image's edge skip the taps that fall outside by starting later or ending
// earlier.
#pragma once

#include "simd.h"

namespace sk {
namespace SK_ISA {

struct Chunk {
  int64_t words;  // where its entries start in the word array
  int32_t row;    // first output row (channel)
  int32_t log_r;  // R = 1 << log_r
};

// P neighbouring output pixels of one tile.
struct PixelBlock {
  int64_t tile;            // floats from the tile's start to the first pixel, for a tap at offset 0
  int64_t out;             // floats from an output row's start to the first pixel, first lane
  int32_t seg_lo, seg_hi;  // vertical taps inside the image
};

struct RowsContext {
  const float* tile;
  int64_t pixel_step;  // floats between neighbouring output pixels' inputs in the tile
  const float* words;
  const int32_t*
      segments;  // [chunk][seg_stride]: entry index where each segment starts, and the end
  int64_t seg_stride;
  float* out;
  int64_t row_stride, out_step;  // floats between output rows, between neighbouring output pixels
  const float* bias;
  bool relu;
  bool stream;    // all stores are full, aligned vectors: bypass the cache
  int64_t valid;  // batch entries of the tile that exist
};

using RowsKernel = void (*)(const RowsContext&, const Chunk* chunks, int64_t chunk_begin,
                            int64_t chunk_end, const PixelBlock* blocks, int64_t block_begin,
                            int64_t block_end);

// Entries worked on at once, each with own accumulators, where R*P*V alone would not hide the
// latency of the FMA.
template <int A>
struct Unroll {
  static constexpr int value = kAccumulators / A >= 4 ? 4 : (kAccumulators / A >= 2 ? 2 : 1);
};

template <int R, int P, int V>
SK_INLINE void accumulate_entry(Vec (&acc)[R][P][V], const float* base, const float* entry,
                                int64_t step) {
  int32_t offset;
  std::memcpy(&offset, entry, sizeof(offset));
  const float* x = base + offset;
  if constexpr (R == 1) {
    const Vec w = vset1(entry + 1);
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v)
        acc[0][p][v] = vfma(w, vload(x + p * step + v * kLanes), acc[0][p][v]);
  } else {
    Vec xs[P][V];
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) xs[p][v] = vload(x + p * step + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = vset1(entry + 1 + r);
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < V; ++v) acc[r][p][v] = vfma(w, xs[p][v], acc[r][p][v]);
    }
  }
}

// Bias, ReLU and the store of one output row's P x V vectors.
template <int P, int V>
SK_INLINE void store_row(const RowsContext& c, const Vec (&acc)[P][V], float* out, int64_t row) {
  Vec bias = vzero();
  if (c.bias) bias = vset1(c.bias + row);
  for (int p = 0; p < P; ++p) {
    alignas(64) float tail[V * kLanes];
    float* to = c.valid == V * kLanes ? out + p * c.out_step : tail;
    for (int v = 0; v < V; ++v) {
      Vec y = c.bias ? vadd(acc[p][v], bias) : acc[p][v];
      if (c.relu) y = vrelu(y);
      if (c.stream) {
        vstream(to + v * kLanes, y);
      } else {
        vstore(to + v * kLanes, y);
      }
    }
    if (to == tail) std::memcpy(out + p * c.out_step, tail, size_t(c.valid) * sizeof(float));
  }
}

template <int R, int P, int V>
void rows_kernel(const RowsContext& c, const Chunk* chunks, int64_t chunk_begin, int64_t chunk_end,
                 const PixelBlock* blocks, int64_t block_begin, int64_t block_end) {
  constexpr int U = Unroll<R * P * V>::value;
  constexpr int kWords = 1 + R;
  const int64_t step = c.pixel_step;
  for (int64_t k = chunk_begin; k < chunk_end; ++k) {
    const int32_t* segments = c.segments + k * c.seg_stride;
    const float* list = c.words + chunks[k].words;
    float* out = c.out + chunks[k].row * c.row_stride;
    for (int64_t b = block_begin; b < block_end; ++b) {
      const float* base = c.tile + blocks[b].tile;
      const float* entry = list + int64_t(segments[blocks[b].seg_lo]) * kWords;
      const float* end = list + int64_t(segments[blocks[b].seg_hi]) * kWords;
      Vec acc[U][R][P][V];
      for (int u = 0; u < U; ++u)
        for (int r = 0; r < R; ++r)
          for (int p = 0; p < P; ++p)
            for (int v = 0; v < V; ++v) acc[u][r][p][v] = vzero();
      for (; end - entry >= U * kWords; entry += U * kWords)
        for (int u = 0; u < U; ++u)
          accumulate_entry<R, P, V>(acc[u], base, entry + u * kWords, step);
      if constexpr (U > 1) {
        for (; entry < end; entry += kWords) accumulate_entry<R, P, V>(acc[0], base, entry, step);
        for (int u = 1; u < U; ++u)
          for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p)
              for (int v = 0; v < V; ++v) acc[0][r][p][v] = vadd(acc[0][r][p][v], acc[u][r][p][v]);
      }
      for (int r = 0; r < R; ++r)
        store_row<P, V>(c, acc[0][r], out + r * c.row_stride + blocks[b].out, chunks[k].row + r);
    }
  }
}

// The kernel for 1<<log_r rows, 1<<log_p pixels, 1<<log_v vectors; null where the registers do not
// hold it.
RowsKernel rows_kernel_for(int log_r, int log_p, int log_v);

constexpr int kMaxLog = 3;  // rows, pixels and vectors go up to 8

}  // namespace SK_ISA
}  // namespace sk
