// The inner kernel of the linear products: R output rows of one line of the pattern, V vectors of
// the batch in registers, over the line's entries in one band.
//
// An entry is the index of a source row and the weights by which it enters each of the R rows.
// Between bands the sums wait in the output itself.
#pragma once

#include "dot_sums.h"
#include "sparse_rows.h"

namespace sk {
namespace SK_ISA {

struct LinesCall {
  const float* x;  // source row 0 at the first lane
  int64_t x_pitch;
  const int32_t *lo, *hi;  // entries of line i: [lo[i * step], hi[i * step])
  int64_t step;
  const int32_t* index;
  const float* weights;  // [entry][weight_step]
  int64_t weight_step;
  float* out;              // first output row of line 0, first lane
  int64_t out_pitch;       // from output row to output row
  int64_t rows;            // output rows of a line, R of which are computed
  const float* bias;       // of the first output row of line 0, or null
  bool relu, first, last;  // first and last band
  int64_t valid;           // lanes that exist
};

using LinesKernel = void (*)(const LinesCall&, int64_t begin, int64_t end);

// Vectors of the batch that a kernel of R rows may hold.
constexpr int max_vectors(int r) {
  if (kLanes == 4) return r == 1 ? 8 : (r == 2 ? 4 : 2);
  return kLanes == 8 && r == 4 ? 3 : 4;
}

// Sets of accumulators, so that 8 additions are under way: two units, 4 cycles.
constexpr int sets_of(int accumulators) { return (8 + accumulators - 1) / accumulators; }

template <int V>
SK_INLINE void load_sums(Vec (&acc)[V], const float* p, int64_t valid) {
  if (valid == V * kLanes) {
    SK_UNROLL for (int v = 0; v < V; ++v) acc[v] = vload(p + v * kLanes);
    return;
  }
  SK_UNROLL for (int v = 0; v < V; ++v) {
    const int64_t rest = valid - v * kLanes;
    if (rest > 0)
      acc[v] = rest >= kLanes ? vload(p + v * kLanes) : vload_part(p + v * kLanes, rest);
  }
}

template <int V>
SK_INLINE void store_sums(float* p, const Vec (&acc)[V], int64_t valid) {
  if (valid == V * kLanes) {
    SK_UNROLL for (int v = 0; v < V; ++v) vstore(p + v * kLanes, acc[v]);
    return;
  }
  SK_UNROLL for (int v = 0; v < V; ++v) {
    const int64_t rest = valid - v * kLanes;
    if (rest >= kLanes) {
      vstore(p + v * kLanes, acc[v]);
    } else if (rest > 0) {
      float part[kLanes];
      vstore(part, acc[v]);
      std::memcpy(p + v * kLanes, part, size_t(rest) * sizeof(float));
    }
  }
}

// All entries of a line in a band.
template <int R, int V, int A>
SK_INLINE void add_line(const LinesCall& c, Vec (&acc)[A][R][V], int64_t e, int64_t stop) {
  const float* const x = c.x;
  const int32_t* const index = c.index;
  const int64_t pitch = c.x_pitch, weight_step = c.weight_step;
  const float* w = c.weights + e * weight_step;
  for (; stop - e >= A; e += A, w += A * weight_step) {
    SK_UNROLL for (int a = 0; a < A; ++a)
        accumulate_entry<R, V>(acc[a], x + index[e + a] * pitch, w + a * weight_step);
  }
  for (; e < stop; ++e, w += weight_step) accumulate_entry<R, V>(acc[0], x + index[e] * pitch, w);
}

template <int R, int V>
void lines_kernel(const LinesCall& call, int64_t begin, int64_t end) {
  constexpr int A = sets_of(R * V);
  const LinesCall c = call;  // a vector store may alias anything, a local copy not
  for (int64_t line = begin; line < end; ++line) {
    const int64_t e = c.lo[line * c.step], stop = c.hi[line * c.step];
    if (e == stop && !c.first && !c.last) continue;
    float* out = c.out + line * c.rows * c.out_pitch;
    Vec acc[A][R][V];
    SK_UNROLL for (int a = 0; a < A; ++a) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int v = 0; v < V; ++v) acc[a][r][v] = vzero();
      }
    }
    if (!c.first) {
      SK_UNROLL for (int r = 0; r < R; ++r) load_sums<V>(acc[0][r], out + r * c.out_pitch, c.valid);
    }
    add_line<R, V, A>(c, acc, e, stop);
    SK_UNROLL for (int a = 1; a < A; ++a) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int v = 0; v < V; ++v) acc[0][r][v] = vadd(acc[0][r][v], acc[a][r][v]);
      }
    }
    if (c.last && c.bias) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        const Vec bias = vset1(c.bias + line * c.rows + r);
        SK_UNROLL for (int v = 0; v < V; ++v) acc[0][r][v] = vadd(acc[0][r][v], bias);
      }
    }
    if (c.last && c.relu) {
      SK_UNROLL for (int r = 0; r < R; ++r) {
        SK_UNROLL for (int v = 0; v < V; ++v) acc[0][r][v] = vrelu(acc[0][r][v]);
      }
    }
    SK_UNROLL for (int r = 0; r < R; ++r) store_sums<V>(out + r * c.out_pitch, acc[0][r], c.valid);
  }
}

template <int R, int V>
LinesKernel lines_kernel_of(int64_t vectors) {
  if constexpr (V > 1) {
    if (vectors < V) return lines_kernel_of<R, V - 1>(vectors);
  }
  return &lines_kernel<R, V>;
}

}  // namespace SK_ISA
}  // namespace sk
