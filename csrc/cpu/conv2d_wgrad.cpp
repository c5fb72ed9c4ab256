// conv2d_wgrad: the weight gradient at the pattern (a sampled product), tile by tile of the input.
//
// Work is cut in at most kMaxParts parts of tiles, a number that depends on the shape alone; each
// part sums into its own partial values, and the parts are added in order: the result is the same
// for every number of threads.
#include "conv2d.h"
#include "pattern_check.h"
#include "scratch.h"
#include "wgrad_lists.h"
#include "wgrad_prefetch.h"

namespace sk {
namespace SK_ISA {
namespace {

template <int R, int K>
DotKernel dot_kernel_of(int64_t k) {
  if constexpr (K > 1) {
    if (k < K) return dot_kernel_of<R, K - 1>(k);
  }
  return &dot_kernel<R, K>;
}
DotKernel dot_kernel_for(int64_t r, int64_t k) {
  if (r == 1) return dot_kernel_of<1, max_columns(1)>(k);
  if (r == 2) return dot_kernel_of<2, max_columns(2)>(k);
  return dot_kernel_of<kMaxGradRows, max_columns(kMaxGradRows)>(k);
}

struct Job {
  const ConvGeometry& g;
  const WgradPlan& plan;
  const PatternView& pattern;
  const ColumnLists& lists;
  const float *grad, *x;
};

// Dot products of r gradient rows with `count` columns, in groups as equal as can be: a group of
// one or two columns would wait for its own additions.
void run_columns(const DotRegion& d, const float* grad, const float* x, const int32_t* offset,
                 int64_t scale, int64_t count, int64_t r, int64_t bh, float* partial) {
  int64_t groups = ceil_div(count, max_columns(int(r)));
  for (; groups > 0; --groups) {
    const int64_t k = ceil_div(count, groups);
    dot_kernel_for(r, k)(d, grad, x, offset, scale, partial, bh);
    offset += k;
    partial += k * bh;
    count -= k;
  }
}

// One thread's buffers.
struct Buffers {
  float *tile, *grad;
};

struct BandVisit {
  const WgradTile& t;
  int64_t band;
  const float* tile;  // the input of the band's first channel
};

// All stored columns of one block row in one band of one tile.
void run_block_row(const Job& j, const BandVisit& v, int64_t row, float* packed, float* partial) {
  const WgradPlan& plan = j.plan;
  const PatternView& p = j.pattern;
  const int32_t* keys = j.lists.keys + row * (plan.keys + 1) + v.band * plan.keys_per_band;
  if (keys[0] == keys[plan.keys_per_band]) return;
  const int64_t i = row % p.row_blocks, first = p.first_column(row);
  const int64_t channel = row / p.row_blocks * p.seg_rows + i * p.bh;
  const int64_t height = imin(p.bh, p.seg_rows - i * p.bh);
  const float* x = v.tile;
  if (!j.lists.value)
    x += (p.first_channel(row) - v.band * plan.band_channels) * plan.tile.pitch;
  const TileSource source{j.grad, j.g.out_h, j.g.out_w, j.g.batch};
  const TileShape shape = plan.grad_shape(v.t);
  for (int64_t r0 = 0; r0 < height;) {
    const int r = pow2_floor(imin<int64_t>(height - r0, kMaxGradRows));
    DotRegion d;
    const float* grad = packed;
    if (plan.direct) {
      d.grad_row = j.g.out_h * j.g.out_w * j.g.batch;
      grad = j.grad + (channel + r0) * d.grad_row;
    } else {
      d.grad_row = shape.pitch;
      pack_tile(packed, shape, source, channel + r0, r, v.t.i0, v.t.rows, v.t.j0, v.t.n0);
    }
    for (int64_t key = 0; key < plan.keys_per_band; ++key) {
      int64_t grad_at, x_at;
      if (keys[key] == keys[key + 1] || !plan.region(j.g, v.t, key, d, grad_at, x_at)) continue;
      const int64_t at = first + keys[key];
      run_columns(d, grad + grad_at, x + x_at, j.lists.offset + at, j.lists.scale,
                  keys[key + 1] - keys[key], r, p.bh, partial + at * p.bh + r0);
    }
    r0 += r;
  }
}

TileWindow input_window(const Job& j, const WgradTile& t, int64_t band) {
  const int64_t c0 = band * j.plan.band_channels;
  return {{j.x, j.g.in_h, j.g.in_w, j.g.batch},
          c0, imin(j.plan.tile_channels, j.g.in_channels - c0), t.y0, t.y1 - t.y0, t.x0,
          j.plan.tile.width, t.n0, j.plan.tile.lanes};
}

TileWindow grad_window(const Job& j, const WgradTile& t) {
  return {{j.grad, j.g.out_h, j.g.out_w, j.g.batch},
          0, j.g.out_channels, t.i0, t.rows, t.j0, t.cols, t.n0, j.plan.tile.lanes};
}

// What run_block_row will read of one block row: its lists, its sums and its gradients lie wherever
// the row before ended, in no order that the hardware foresees.
void prefetch_row(const Job& j, const BandVisit& v, int64_t row, const float* partial) {
  const PatternView& p = j.pattern;
  const int32_t* keys = j.lists.keys + row * (j.plan.keys + 1) + v.band * j.plan.keys_per_band;
  const int64_t at = p.first_column(row) + keys[0], count = keys[j.plan.keys_per_band] - keys[0];
  if (count == 0) return;
  prefetch_words(j.lists.offset + at, count);
  prefetch_words(partial + at * p.bh, count * p.bh);
  const int64_t i = row % p.row_blocks * p.bh, channel = row / p.row_blocks * p.seg_rows + i;
  prefetch_window(grad_window(j, v.t), channel, channel + imin(p.bh, p.seg_rows - i));
}

void run_band(const Job& j, const BandVisit& v, const TileWindow* next, int64_t row_begin,
              int64_t row_end, float* packed, float* partial) {
  const int64_t rows = row_end - row_begin;
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (row + 1 < row_end) prefetch_row(j, v, row + 1, partial);
    if (next) {
      const int64_t at = row - row_begin;
      prefetch_window(*next, next->channels * at / rows, next->channels * (at + 1) / rows);
    }
    run_block_row(j, v, row, packed, partial);
  }
}

void run_part(const Job& j, int64_t part, int64_t row_begin, int64_t row_end, const Buffers& buffers,
              float* partial) {
  const WgradPlan& plan = j.plan;
  const int64_t begin = plan.tiles * part / plan.parts * plan.bands;
  const int64_t end = plan.tiles * (part + 1) / plan.parts * plan.bands;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t band = index % plan.bands;
    const WgradTile t = plan.locate(j.g, index / plan.bands);
    if (plan.direct) {
      const float* first = j.x + band * plan.band_channels * plan.tile.pitch;
      run_band(j, {t, band, first}, nullptr, row_begin, row_end, buffers.grad, partial);
      continue;
    }
    const TileWindow w = input_window(j, t, band);
    pack_tile(buffers.tile, plan.tile, w.source, w.c0, w.channels, w.y0, w.rows, w.x0, w.n0);
    const int64_t after = imin(index + 1, end - 1);
    const TileWindow next =
        input_window(j, plan.locate(j.g, after / plan.bands), after % plan.bands);
    run_band(j, {t, band, buffers.tile}, &next, row_begin, row_end, buffers.grad, partial);
  }
}

// First block row with at least `share` of the stored blocks before it.
int64_t split_row(const PatternView& p, int64_t split, int64_t splits) {
  if (split == splits) return p.block_rows;
  const int64_t target = int64_t(p.crow[p.block_rows]) * split / splits;
  int64_t lo = 0, hi = p.block_rows;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (p.crow[mid] < target) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// The partial sums of one block row, part after part, into the order of the pattern.
void add_parts(const Job& j, float* dvalues, const float* partial, int64_t stored, int64_t row) {
  const PatternView& p = j.pattern;
  const int64_t first = p.first_column(row), end = p.first_column(row + 1), parts = j.plan.parts;
  if (!j.lists.value) {
    for (int64_t i = first * p.bh; i < end * p.bh; ++i) dvalues[i] = partial[i];
    for (int64_t c = 1; c < parts; ++c)
      for (int64_t i = first * p.bh; i < end * p.bh; ++i) dvalues[i] += partial[c * stored + i];
    return;
  }
  float* to = dvalues + first * p.bh;
  // What lies outside a partial block is in no list.
  if (p.bw > 1) zero_floats(to, (end - first) * p.bh);
  const int64_t columns = j.lists.keys[row * (j.plan.keys + 1) + j.plan.keys];
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t h = 0; h < p.bh; ++h) {
      const float* from = partial + (first + i) * p.bh + h;
      float sum = from[0];
      for (int64_t c = 1; c < parts; ++c) sum += from[c * stored];
      to[j.lists.value[first + i] + h * p.bw] = sum;
    }
  }
}

// Scratch of one call, and where its pieces lie.
struct Layout {
  size_t lists, keys, partial, tile, thread;
  Layout(const WgradPlan& plan, const PatternView& p, int64_t stored) {
    const bool bare = lists_are_pattern(plan, p);
    lists = bare ? 0 : ScratchLease::padded(size_t(p.crow[p.block_rows] * p.bw) * 4);
    keys = ScratchLease::padded(size_t(p.block_rows * (plan.keys + 1)) * 4);
    partial = bare && plan.parts == 1 ? 0 : ScratchLease::padded(size_t(plan.parts * stored) * 4);
    tile = ScratchLease::padded(size_t(plan.tile_floats()) * 4);
    thread = tile + ScratchLease::padded(size_t(plan.grad_floats()) * 4);
  }
  size_t bytes(int threads) const { return 2 * lists + keys + partial + size_t(threads) * thread; }
};

void run_job(const ConvGeometry& g, const WgradPlan& plan, const PatternView& p, const float* grad,
             const float* x, float* dvalues, int64_t stored, int threads) {
  const Layout layout(plan, p, stored);
  ScratchLease lease(layout.bytes(threads));
  int32_t* offset = layout.lists ? static_cast<int32_t*>(lease.take(layout.lists)) : nullptr;
  int32_t* value = layout.lists ? static_cast<int32_t*>(lease.take(layout.lists)) : nullptr;
  int32_t* keys = static_cast<int32_t*>(lease.take(layout.keys));
  float* partial = layout.partial ? static_cast<float*>(lease.take(layout.partial)) : dvalues;
  char* scratch =
      layout.thread ? static_cast<char*>(lease.take(size_t(threads) * layout.thread)) : nullptr;
  const ColumnLists lists{offset ? offset : p.col, value, keys, offset ? 1 : plan.tile.pitch};
  const Job j{g, plan, p, lists, grad, x};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p.block_rows; ++row) {
    const int64_t first = p.first_column(row);
    list_columns(plan, p, g, row, offset ? offset + first : nullptr, value ? value + first : nullptr,
                 keys + row * (plan.keys + 1));
  }
  // Rows are independent: cut them when there are fewer parts than threads, packing the same tiles
  // more than once.
  int64_t splits = 1;
  while (splits < p.block_rows && plan.parts * splits < 4 * threads &&
         (plan.parts * splits) % threads != 0)
    ++splits;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t thread;
#pragma omp atomic capture
    thread = next++;
    float* tile = reinterpret_cast<float*>(scratch + size_t(thread) * layout.thread);
    const Buffers buffers{tile, tile + layout.tile / 4};
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.parts * splits; ++item) {
      const int64_t part = item / splits, split = item % splits;
      const int64_t begin = split_row(p, split, splits), end = split_row(p, split + 1, splits);
      float* to = partial + part * stored;
      const int64_t from = p.first_column(begin) * p.bh;
      zero_floats(to + from, p.first_column(end) * p.bh - from);
      run_part(j, part, begin, end, buffers, to);
    }
  }
  if (partial == dvalues) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p.block_rows; ++row) add_parts(j, dvalues, partial, stored, row);
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
  const WgradPlan plan = plan_wgrad(g, bh, bw, double(stored) / double(g.out_channels));
  const PatternView p{crow,     col,        bh,         bw,        seg_rows,
                      seg_cols, row_blocks, col_blocks, block_rows};
  run_job(g, plan, p, grad, x, dvalues, stored, threads);
}

}  // namespace SK_ISA
}  // namespace sk
