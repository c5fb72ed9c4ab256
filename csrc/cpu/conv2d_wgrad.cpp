// conv2d_wgrad: the weight gradient at the pattern (a sampled product), tile by tile of the tensors
// as they are.
//
// Work is cut in at most kMaxParts parts of tiles, a number that depends on the shape alone; each
// part sums into its own partial values, and the parts are added in order: the result is the same
// for every number of threads.
#include "conv2d.h"
#include "pattern_check.h"
#include "product_lists.h"
#include "scratch.h"
#include "wgrad_lists.h"

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
  const ColumnLists lists;
  const float *grad, *x;
};

// Dot products of r gradient rows with `count` columns, in groups as equal as can be: a group of
// one or two columns would wait for its own additions.
SK_INLINE void run_columns(const DotRegion& d, const float* grad, const float* x,
                           const int32_t* offset, int64_t scale, int64_t count, int r, int64_t bh,
                           float* partial) {
  const int64_t most = max_columns(r);
  for (; count >= 2 * most; count -= most, offset += most, partial += most * bh)
    dot_kernel_for(r, most)(d, grad, x, offset, scale, partial, bh);
  if (count > most) {
    const int64_t half = (count + 1) / 2;
    dot_kernel_for(r, half)(d, grad, x, offset, scale, partial, bh);
    count -= half, offset += half, partial += half * bh;
  }
  dot_kernel_for(r, count)(d, grad, x, offset, scale, partial, bh);
}

struct BandVisit {
  int64_t band;
  const float* x;  // the band's first channel
  const KeyRegion *regions, *regions_end;
};

// A block row: its first output channel, and how many it has.
struct BlockRow {
  int64_t index, group, channel, height;
};

SK_INLINE BlockRow block_row(const PatternView& p, int64_t index) {
  const int64_t group = index / p.row_blocks, i = (index - group * p.row_blocks) * p.bh;
  return {index, group, group * p.seg_rows + i, imin(p.bh, p.seg_rows - i)};
}

// All stored columns of one block row in one band of one tile.
void run_block_row(const Job& j, const BandVisit& v, const BlockRow& row, float* partial) {
  const WgradPlan& plan = j.plan;
  const PatternView& p = j.pattern;
  const int32_t* bounds = j.lists.bounds + j.lists.at(row.index, v.band);
  const float* x = v.x;
  // Column indices count from the group's first channel, and shift by no tap.
  if (!j.lists.value)
    x += (row.group * p.seg_cols - v.band * plan.band_channels) * plan.x_channel +
         plan.tap_shift(j.g, 0) * plan.pixel;
  for (int64_t r0 = 0; r0 < row.height;) {
    const int r = pow2_floor(imin<int64_t>(row.height - r0, kMaxGradRows));
    const float* grad = j.grad + (row.channel + r0) * plan.grad_channel;
    for (const KeyRegion* k = v.regions; k != v.regions_end; ++k) {
      const int64_t at = bounds[k->begin], count = bounds[k->end] - at;
      if (count == 0) continue;
      run_columns(k->dots, grad + k->grad_at, x + k->x_at, j.lists.offset + at, j.lists.scale,
                  count, r, p.bh, partial + at * p.bh + r0);
    }
    r0 += r;
  }
}

void run_part(const Job& j, int64_t part, int64_t row_begin, int64_t row_end, KeyRegion* regions,
              float* partial) {
  const WgradPlan& plan = j.plan;
  const int64_t end = plan.tiles * (part + 1) / plan.parts;
  for (int64_t index = plan.tiles * part / plan.parts; index < end; ++index) {
    const int64_t count = plan.list_regions(j.g, plan.locate(j.g, index), regions);
    for (int64_t band = 0; band < plan.bands; ++band) {
      const BandVisit v{band, j.x + band * plan.band_channels * plan.x_channel, regions,
                        regions + count};
      for (int64_t row = row_begin; row < row_end; ++row) {
        const int32_t* bounds = j.lists.bounds + j.lists.at(row, band);
        if (bounds[0] != bounds[plan.keys]) run_block_row(j, v, block_row(j.pattern, row), partial);
      }
    }
  }
}

// First block row with at least `share` of the stored blocks before it.
int64_t split_row(const PatternView& p, int64_t split, int64_t splits) {
  if (split == splits) return p.block_rows;
  return lower_bound(p.crow, 0, p.block_rows, int64_t(p.crow[p.block_rows]) * split / splits);
}

// The partial sums of one block row, part after part, into the order of the pattern.
void add_parts(const Job& j, float* dvalues, const float* partial, int64_t stored, int64_t row) {
  const PatternView& p = j.pattern;
  const int64_t parts = j.plan.parts, first = int64_t(p.crow[row]) * p.bh * p.bw;
  const int64_t end = int64_t(p.crow[row + 1]) * p.bh * p.bw;
  if (!j.lists.value) {
    for (int64_t i = first; i < end; ++i) dvalues[i] = partial[i];
    for (int64_t c = 1; c < parts; ++c)
      for (int64_t i = first; i < end; ++i) dvalues[i] += partial[c * stored + i];
    return;
  }
  // What lies outside a partial block is in no list.
  if (p.bw > 1) zero_floats(dvalues + first, end - first);
  for (int64_t band = 0; band < j.plan.bands; ++band) {
    const int32_t* bounds = j.lists.bounds + j.lists.at(row, band);
    for (int64_t at = bounds[0]; at < bounds[j.plan.keys]; ++at) {
      float* to = dvalues + first + j.lists.value[at];
      for (int64_t h = 0; h < p.bh; ++h) {
        const float* from = partial + at * p.bh + h;
        float sum = from[0];
        for (int64_t c = 1; c < parts; ++c) sum += from[c * stored];
        to[h * p.bw] = sum;
      }
    }
  }
}

// Clears the sums of block rows [begin, end).
void clear_rows(const Job& j, float* partial, int64_t begin, int64_t end) {
  const int64_t bh = j.pattern.bh;
  for (int64_t band = 0; band < j.plan.bands; ++band) {
    const int64_t rows = j.lists.value ? end - begin : 1;  // neighbours, or each row by itself
    for (int64_t row = begin; row < end; row += rows) {
      const int32_t from = j.lists.bounds[j.lists.at(row, band)];
      const int32_t to = j.lists.bounds[j.lists.at(row + rows - 1, band) + j.plan.keys];
      zero_floats(partial + from * bh, (to - from) * bh);
    }
  }
}

// Scratch of one call beside the lists.
struct Layout {
  size_t partial, regions;
  Layout(const WgradPlan& plan, const PatternView& p, int64_t stored) {
    const bool in_place = lists_are_pattern(plan, p) && plan.parts == 1;
    partial = in_place ? 0 : ScratchLease::padded(size_t(plan.parts * stored) * 4);
    regions = ScratchLease::padded(size_t(plan.keys) * sizeof(KeyRegion));
  }
  size_t bytes(int threads) const { return partial + size_t(threads) * regions; }
};

void run_job(const Job& j, float* dvalues, int64_t stored, int threads) {
  const WgradPlan& plan = j.plan;
  const PatternView& p = j.pattern;
  const Layout layout(plan, p, stored);
  ScratchLease lease(layout.bytes(threads));
  float* partial = layout.partial ? static_cast<float*>(lease.take(layout.partial)) : dvalues;
  char* scratch = static_cast<char*>(lease.take(size_t(threads) * layout.regions));
  // Rows are independent: cut them when there are fewer parts than threads.
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
    auto* regions = reinterpret_cast<KeyRegion*>(scratch + size_t(thread) * layout.regions);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < plan.parts * splits; ++item) {
      const int64_t part = item / splits, split = item % splits;
      const int64_t begin = split_row(p, split, splits), end = split_row(p, split + 1, splits);
      if (begin == end) continue;
      clear_rows(j, partial + part * stored, begin, end);
      run_part(j, part, begin, end, regions, partial + part * stored);
    }
  }
  if (partial == dvalues) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p.block_rows; ++row) add_parts(j, dvalues, partial, stored, row);
}

}  // namespace

void conv2d_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, const ConvGeometry& g, int64_t bh, int64_t bw,
                  int64_t capacity, ListCache* cache, int threads) {
  const int64_t seg_rows = g.out_channels / g.groups, seg_cols = g.in_channels / g.groups;
  const int64_t row_blocks = ceil_div(seg_rows, bh), col_blocks = ceil_div(seg_cols, bw);
  const int64_t block_rows = row_blocks * g.groups;
  const Variant variant = find_variant({Pass::kConv2dWgrad, g, bh, bw, capacity});
  const ListKey key = list_key(g, bh, bw, kWgradLists, variant);
  if (!is_known(cache, key)) {
    check_pattern(
        {"crow_indices", "col_indices", crow, col, nullptr, block_rows, g.kh * g.kw * col_blocks},
        capacity, threads);
  }
  const int64_t stored = int64_t(crow[block_rows]) * bh * bw;
  zero_floats(dvalues + stored, capacity * bh * bw - stored);
  if (stored == 0) return;
  if (g.batch * g.out_h * g.out_w <= 0) {
    zero_floats(dvalues, stored);
    return;
  }
  const WgradPlan plan = plan_wgrad(g, bh, double(stored) / double(g.out_channels), variant);
  const PatternView p{crow, col, bh, bw, seg_rows, seg_cols, row_blocks, col_blocks, block_rows};
  with_lists<ColumnSizes>(
      cache, key, [&] { return column_sizes(plan, p); },
      [&](const ColumnSizes&, const ColumnArrays& arrays) {
        fill_lists(plan, p, g, arrays, threads);
      },
      [&](const ColumnSizes&, const ColumnArrays& arrays) {
        run_job({g, plan, p, view_lists(plan, p, arrays), grad, x}, dvalues, stored, threads);
      });
}

uint64_t conv2d_wgrad_print(const VariantKey& key, Variant variant) {
  const double stored = double(key.capacity) * double(key.bh * key.bw);
  const double per_row = stored / double(imax<int64_t>(1, key.g.out_channels));
  return plan_print(plan_wgrad(key.g, key.bh, per_row, variant));
}

}  // namespace SK_ISA
}  // namespace sk
