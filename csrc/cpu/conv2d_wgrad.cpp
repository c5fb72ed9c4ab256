// conv2d_wgrad: the weight gradient at the pattern (a sampled product), tile by tile of packed
// input.
//
// Work is cut in at most kMaxParts parts of tiles, a number that depends on the shape alone; each
// part sums into its own partial values, and the parts are added in order: the result is the same
// for every number of threads.
#include "conv2d.h"
#include "pattern_check.h"
#include "scratch.h"
#include "sparse_dots.h"
#include "tile.h"
#include "wgrad_plan.h"

namespace sk {
namespace SK_ISA {
namespace {

template <int R, int K>
DotKernel pick() {
  if constexpr (R * K <= kAccumulators) {
    return &dot_kernel<R, K>;
  } else {
    return nullptr;
  }
}
template <int R>
DotKernel pick_k(int k) {
  switch (k) {
    case 1:
      return pick<R, 1>();
    case 2:
      return pick<R, 2>();
    case 4:
      return pick<R, 4>();
    default:
      return pick<R, 8>();
  }
}
DotKernel dot_kernel_for(int r, int k) {
  return r == 1 ? pick_k<1>(k) : (r == 2 ? pick_k<2>(k) : pick_k<4>(k));
}

// One stored column of a block row: where its input lies in the tile, and where its gradients go.
struct Columns {
  int32_t* offset;  // [sum of stored columns], block row by block row, ordered by (band, tap) key
  int32_t* value;   // index of the column's first value, relative to the block row's first
  int32_t* keys;    // [block_rows][key_count + 1]: where each key's columns start
};

struct Job {
  const ConvGeometry& g;
  const WgradPlan& plan;
  const int32_t *crow, *col;
  const float *grad, *x;
  int64_t bh, bw, row_blocks, col_blocks, seg_rows, seg_cols, block_rows;
  Columns columns;
};

// Walks the stored columns of one block row in their order, tap by tap and channel by channel, and
// calls visit(key, offset, value index) for each. No divisions: there are as many columns as
// non-zeros.
template <class Visit>
SK_INLINE void walk_columns(const Job& j, int64_t row, Visit visit) {
  const WgradPlan& plan = j.plan;
  const int64_t first = row / j.row_blocks * j.seg_cols;  // the group's first channel
  const int64_t first_band = first / plan.band_channels;
  int64_t tap = -1, tap_start = 0, tap_end = 0, band = 0, band_end = 0, key = 0, base = 0;
  for (int64_t e = j.crow[row]; e < j.crow[row + 1]; ++e) {
    while (j.col[e] >= tap_end) {
      ++tap;
      tap_start = tap_end;
      tap_end += j.col_blocks;
      band = first_band;
      band_end = 0;
    }
    const int64_t c0 = (j.col[e] - tap_start) * j.bw;
    const int64_t width = imin(j.bw, j.seg_cols - c0);
    const int64_t value = (e - j.crow[row]) * j.bh * j.bw;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t channel = first + c0 + c;
      if (channel >= band_end) {
        while (channel >= (band + 1) * plan.band_channels) ++band;
        band_end = (band + 1) * plan.band_channels;
        key = band * plan.keys_per_band + (plan.clipped ? tap : 0);
        base = plan.tap_offset(j.g, tap) - band * plan.band_channels * plan.tile.pitch;
      }
      visit(key, base + channel * plan.tile.pitch, value + c);
    }
  }
}

// Sorts the stored columns of one block row by (channel band, tap); inside a key they stay in order
// of channels.
void list_columns(const Job& j, int64_t row) {
  const int64_t count = j.plan.keys;
  int32_t* keys = j.columns.keys + row * (count + 1);
  int32_t* offset = j.columns.offset + int64_t(j.crow[row]) * j.bw;
  int32_t* value = j.columns.value + int64_t(j.crow[row]) * j.bw;
  std::memset(keys, 0, size_t(count + 1) * 4);
  walk_columns(j, row, [&](int64_t key, int64_t, int64_t) { ++keys[key + 1]; });
  for (int64_t k = 0; k < count; ++k) keys[k + 1] += keys[k];
  walk_columns(j, row, [&](int64_t key, int64_t o, int64_t v) {
    const int32_t at = keys[key]++;
    offset[at] = int32_t(o);
    value[at] = int32_t(v);
  });
  for (int64_t k = count; k > 0; --k)
    keys[k] = keys[k - 1];  // filling moved every start to its end
  keys[0] = 0;
}

// Dot products of R gradient rows with columns [begin, end) of one key.
void run_columns(const DotRegion& d, const float* grad, const float* x, const int32_t* offset,
                 const int32_t* value, int64_t begin, int64_t end, int r, int64_t bw,
                 float* partial) {
  constexpr int kMax = 8;
  float sums[kAccumulators];
  while (begin < end) {
    const int64_t n = end - begin;
    int k = imin(kMax, kAccumulators / r);
    while (k > 1 && 4 * n < 3 * k) k /= 2;
    // A group that is nearly full repeats a column, which costs less than a second, narrow group.
    int32_t padded[kMax];
    const int32_t* offsets = offset + begin;
    const int64_t used = imin<int64_t>(n, k);
    if (used < k) {
      for (int i = 0; i < k; ++i) padded[i] = offset[begin + imin<int64_t>(i, used - 1)];
      offsets = padded;
    }
    dot_kernel_for(r, k)(d, grad, x, offsets, sums);
    for (int64_t i = 0; i < used; ++i)
      for (int64_t h = 0; h < r; ++h) partial[value[begin + i] + h * bw] += sums[h * k + i];
    begin += used;
  }
}

// All stored columns of one block row against one packed tile (one band of channels).
void run_block_row(const Job& j, const WgradTile& t, int64_t band, int64_t row, const float* tile,
                   float* grad, float* partial) {
  const WgradPlan& plan = j.plan;
  const int32_t* keys = j.columns.keys + row * (plan.keys + 1);
  const int64_t key0 = band * plan.keys_per_band, key1 = key0 + plan.keys_per_band;
  if (keys[key0] == keys[key1]) return;
  const int64_t group = row / j.row_blocks, i = row % j.row_blocks;
  const int64_t height = imin(j.bh, j.seg_rows - i * j.bh);
  const int64_t first = int64_t(j.crow[row]) * j.bw;
  const TileSource source{j.grad, j.g.out_h, j.g.out_w, j.g.batch};
  const TileShape shape = plan.grad_shape(t);
  for (int64_t r0 = 0; r0 < height;) {
    const int r = pow2_floor(imin<int64_t>(height - r0, 4));
    pack_tile(grad, shape, source, group * j.seg_rows + i * j.bh + r0, r, t.i0, t.rows, t.j0, t.n0);
    float* to = partial + int64_t(j.crow[row]) * j.bh * j.bw + r0 * j.bw;
    for (int64_t key = key0; key < key1; ++key) {
      if (keys[key] == keys[key + 1]) continue;
      int64_t grad_at, x_at;
      DotRegion d;
      if (!plan.region(j.g, t, key - key0, d, grad_at, x_at)) continue;
      d.grad_row = shape.pitch;
      run_columns(d, grad + grad_at, tile + x_at, j.columns.offset + first, j.columns.value + first,
                  keys[key], keys[key + 1], r, j.bw, to);
    }
    r0 += r;
  }
}

void run_part(const Job& j, int64_t part, int64_t row_begin, int64_t row_end, float* tile,
              float* grad, float* partial) {
  const WgradPlan& plan = j.plan;
  const TileSource source{j.x, j.g.in_h, j.g.in_w, j.g.batch};
  for (int64_t index = plan.tiles * part / plan.parts; index < plan.tiles * (part + 1) / plan.parts;
       ++index) {
    const WgradTile t = plan.locate(j.g, index);
    for (int64_t band = 0; band < plan.bands; ++band) {
      const int64_t c0 = band * plan.band_channels;
      const int64_t channels = imin(plan.band_channels, j.g.in_channels - c0);
      pack_tile(tile, plan.tile, source, c0, channels, t.y0, t.y1 - t.y0, t.x0, t.n0);
      for (int64_t row = row_begin; row < row_end; ++row)
        run_block_row(j, t, band, row, tile, grad, partial);
    }
  }
}

// First block row with at least `share` of the stored blocks before it.
int64_t split_row(const Job& j, int64_t split, int64_t splits) {
  if (split == splits) return j.block_rows;
  const int64_t target = int64_t(j.crow[j.block_rows]) * split / splits;
  int64_t lo = 0, hi = j.block_rows;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (j.crow[mid] < target) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

void add_parts(float* dvalues, const float* partial, int64_t parts, int64_t stored, int threads) {
  constexpr int64_t kStep = 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < stored; at += kStep) {
    const int64_t end = imin(stored, at + kStep);
    for (int64_t i = at; i < end; ++i) dvalues[i] = partial[i];
    for (int64_t c = 1; c < parts; ++c)
      for (int64_t i = at; i < end; ++i) dvalues[i] += partial[c * stored + i];
  }
}

void run_job(Job& j, float* dvalues, int64_t stored, int threads) {
  const WgradPlan& plan = j.plan;
  const int64_t columns = int64_t(j.crow[j.block_rows]) * j.bw;
  const size_t list_bytes = ScratchLease::padded(size_t(columns) * 4);
  const size_t key_bytes = ScratchLease::padded(size_t(j.block_rows * (plan.keys + 1)) * 4);
  const size_t part_bytes =
      plan.parts > 1 ? ScratchLease::padded(size_t(plan.parts * stored) * 4) : 0;
  const size_t tile_bytes = ScratchLease::padded(size_t(plan.band_channels * plan.tile.pitch) * 4);
  const size_t thread_bytes = tile_bytes + ScratchLease::padded(size_t(plan.grad_floats()) * 4);
  ScratchLease lease(2 * list_bytes + key_bytes + part_bytes + size_t(threads) * thread_bytes);
  j.columns.offset = static_cast<int32_t*>(lease.take(list_bytes));
  j.columns.value = static_cast<int32_t*>(lease.take(list_bytes));
  j.columns.keys = static_cast<int32_t*>(lease.take(key_bytes));
  float* partial = part_bytes ? static_cast<float*>(lease.take(part_bytes)) : dvalues;
  char* scratch = static_cast<char*>(lease.take(size_t(threads) * thread_bytes));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < j.block_rows; ++row) list_columns(j, row);
  // Rows are independent: cut them when there are fewer parts than threads, packing the same tiles
  // more than once.
  int64_t splits = 1;
  while (splits < j.block_rows && plan.parts * splits < 4 * threads &&
         (plan.parts * splits) % threads != 0)
    ++splits;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t thread;
#pragma omp atomic capture
    thread = next++;
    float* tile = reinterpret_cast<float*>(scratch + size_t(thread) * thread_bytes);
    float* grad = reinterpret_cast<float*>(reinterpret_cast<char*>(tile) + tile_bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.parts * splits; ++item) {
      const int64_t part = item / splits, split = item % splits;
      const int64_t begin = split_row(j, split, splits), end = split_row(j, split + 1, splits);
      float* to = partial + part * stored;
      const int64_t from = int64_t(j.crow[begin]) * j.bh * j.bw;
      zero_floats(to + from, int64_t(j.crow[end]) * j.bh * j.bw - from);
      run_part(j, part, begin, end, tile, grad, to);
    }
  }
  if (part_bytes) add_parts(dvalues, partial, plan.parts, stored, threads);
}

}  // namespace

void conv2d_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, const ConvGeometry& g, int64_t bh, int64_t bw,
                  int64_t capacity, int threads) {
  const int64_t seg_rows = g.out_channels / g.groups, seg_cols = g.in_channels / g.groups;
  const int64_t row_blocks = ceil_div(seg_rows, bh), col_blocks = ceil_div(seg_cols, bw);
  const int64_t block_rows = row_blocks * g.groups;
  check_pattern(
      {"crow_indices", "col_indices", crow, col, nullptr, block_rows, g.kh * g.kw * col_blocks},
      capacity, threads);
  const int64_t stored = int64_t(crow[block_rows]) * bh * bw;
  zero_floats(dvalues + stored, capacity * bh * bw - stored);
  if (stored == 0) return;
  if (g.batch * g.out_h * g.out_w <= 0) {
    zero_floats(dvalues, stored);
    return;
  }
  const WgradPlan plan = plan_wgrad(g, double(stored) / double(g.out_channels));
  Job j{g,  plan,       crow,       col,      grad,     x,          bh,
        bw, row_blocks, col_blocks, seg_rows, seg_cols, block_rows, {}};
  run_job(j, dvalues, stored, threads);
}

}  // namespace SK_ISA
}  // namespace sk
