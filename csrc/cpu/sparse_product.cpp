#include "sparse_product.h"

#include "long_rows.h"
#include "slab_fill.h"

namespace sk {
namespace SK_ISA {
namespace {

template <int LR, int LP, int LV>
RowsKernel pick() {
  if constexpr ((1 << (LR + LP + LV)) <= kAccumulators) {
    return &rows_kernel<1 << LR, 1 << LP, 1 << LV>;
  } else {
    return nullptr;
  }
}
template <int LR, int LP>
RowsKernel pick_v(int v) {
  const RowsKernel k[] = {pick<LR, LP, 0>(), pick<LR, LP, 1>(), pick<LR, LP, 2>(),
                          pick<LR, LP, 3>()};
  return k[v];
}
template <int LR>
RowsKernel pick_p(int p, int v) {
  switch (p) {
    case 0:
      return pick_v<LR, 0>(v);
    case 1:
      return pick_v<LR, 1>(v);
    case 2:
      return pick_v<LR, 2>(v);
    default:
      return pick_v<LR, 3>(v);
  }
}

// Outputs larger than this do not survive in the caches until their reader comes: write them past
// the caches.
constexpr int64_t kStreamBytes = 12 << 20;

size_t slab_scratch(const Product& p, const ProductPlan& plan) {
  // Vectors never leave a channel's pitch, so the slab needs no slack.
  return ScratchLease::padded(size_t(p.src_channels) * size_t(plan.slab.pitch) * 4);
}
size_t sums_scratch(const Product& p, const ProductPlan& plan) {
  if (plan.scatter)
    return ScratchLease::padded(size_t(plan.scatter_rows * kLanes * 4) << plan.scatter_log);
  if (plan.bands() == 1) return 0;
  return ScratchLease::padded(size_t(p.rows) * kAccumulators * kLanes * 4);
}

// Chunks that run between two turns of prefetching.
constexpr int64_t kTurn = 16;

// Vertical taps [lo, hi) that meet the image where tap 0 is at row `top`.
void taps_inside(const Product& p, int64_t top, int64_t& lo, int64_t& hi) {
  lo = imin(p.segments, imax<int64_t>(0, ceil_div(imax<int64_t>(0, -top), p.dy_step)));
  const int64_t below = p.src.height - 1 - top;  // highest dy - dy_first inside the image
  hi = imax(lo, imin(p.segments, floor_div(below, p.dy_step) + 1));
}

// One pixel block through all bands that its row of the image can reach.
void run_bands(const Product& p, const ProductPlan& plan, const ProductLists& lists, RowsKernel run,
               RowsCall& c, Ahead& ahead, int64_t top, int64_t begin, int64_t end) {
  int64_t lo, hi;
  taps_inside(p, top, lo, hi);
  const int64_t first = lo / plan.band_segs;
  const int64_t last = lo == hi ? first : (hi - 1) / plan.band_segs;
  c.first = true;
  for (int64_t by = first; by <= last; ++by) {
    const int64_t seg0 = by * plan.band_segs;
    c.seg_lo = imin(plan.band_segs, imax(lo - seg0, int64_t(0)));
    c.seg_hi = imax(c.seg_lo, imin(plan.band_segs, hi - seg0));
    for (int64_t bc = 0; bc < plan.channel_bands; ++bc) {
      const int64_t band = by * plan.channel_bands + bc;
      c.starts = lists.starts + band * lists.count * plan.band_segs;
      c.last = by == last && bc + 1 == plan.channel_bands;
      for (int64_t k = begin; k < end; k += kTurn) {
        run(c, lists.chunks, k, imin(end, k + kTurn));
        ahead.fetch();
      }
      c.first = false;
    }
  }
}

// Chunks [begin, end), all of one height, over every pixel of the slab. The last block of a row
// overlaps the one before it.
void run_chunks(const Product& p, const ProductPlan& plan, const ProductLists& lists, const Slab& t,
                const float* tile, RowsCall& c, Ahead& ahead, int64_t begin, int64_t end) {
  const int log_r = lists.chunks[begin].log_r;
  const int64_t width = pixels_at_once(t.cols, log_r, plan.log_v);
  int log_p = 0;
  while ((int64_t(1) << log_p) < width) ++log_p;
  const RowsKernel run = rows_kernel_for(log_r, log_p, plan.log_v);
  for (int64_t i = t.i0; i < t.i0 + t.rows; ++i) {
    const int64_t top = i * p.step_y + p.dy_first;
    for (int64_t j = 0; j < t.cols; j += width) {
      const int64_t at = imin(j, t.cols - width);
      c.x = tile + (top - t.y0) * plan.slab.row_pitch + at * plan.slab.lanes;
      const int64_t pixel =
          (p.first_y + i * p.every_y) * p.dst_width + p.first_x + (t.j0 + at) * p.every_x;
      c.out = p.dst + pixel * p.src.batch + t.n0;
      run_bands(p, plan, lists, run, c, ahead, top, begin, end);
    }
  }
}

// Runs of a scattering product between two turns of prefetching.
constexpr int64_t kTurnRuns = 32;

struct ScatterJob {
  const ScatterLists& lists;
  const float* weights;
  int64_t stride;  // weights per entry

  int64_t turns(int64_t begin, int64_t end) const {
    const int64_t per_band = lists.segments * kGroupLogs;
    return (lists.runs_at[end * per_band] - lists.runs_at[begin * per_band]) / kTurnRuns;
  }
};

// Vertical taps [lo, hi) of one band over one pixel block.
void scatter_band(const ProductPlan& plan, const ScatterJob& job, const RowsCall& c, Ahead& ahead,
                  int64_t band, int64_t lo, int64_t hi) {
  const ScatterLists& lists = job.lists;
  for (int64_t s = lo; s < hi; ++s) {
    for (int log_g = 0; log_g < kGroupLogs; ++log_g) {
      const int64_t slot = (band * lists.segments + s) * kGroupLogs + log_g;
      const int64_t first = lists.entries_at[slot];
      ScatterCursor at{lists.rows + first, job.weights + first * job.stride};
      const ScatterKernel run = scatter_kernel_for(log_g, plan.scatter_log);
      const int64_t end = lists.runs_at[slot + 1];
      for (int64_t k = lists.runs_at[slot]; k < end; k += kTurnRuns) {
        run(c.x, plan.slab.pitch, lists.runs + k, lists.runs + imin(end, k + kTurnRuns), at,
            job.stride, c.sums);
        ahead.fetch();
      }
    }
  }
}

// Bands [begin, end) of output rows over every pixel of the slab.
void scatter_slab(const Product& p, const ProductPlan& plan, const ScatterJob& job, const Slab& t,
                  const float* tile, RowsCall& c, Ahead& ahead, int64_t begin, int64_t end) {
  const int log_p = plan.scatter_log - plan.log_v;
  const ScatterStore store = scatter_store_for(log_p, plan.log_v);
  zero_floats(c.sums, (plan.scatter_rows * kLanes) << plan.scatter_log);
  for (int64_t i = t.i0; i < t.i0 + t.rows; ++i) {
    const int64_t top = i * p.step_y + p.dy_first;
    int64_t lo, hi;
    taps_inside(p, top, lo, hi);
    for (int64_t j = 0; j < t.cols; j += int64_t(1) << log_p) {
      const int64_t at = imin(j, t.cols - (int64_t(1) << log_p));
      c.x = tile + (top - t.y0) * plan.slab.row_pitch + at * plan.slab.lanes;
      const int64_t pixel =
          (p.first_y + i * p.every_y) * p.dst_width + p.first_x + (t.j0 + at) * p.every_x;
      c.out = p.dst + pixel * p.src.batch + t.n0;
      for (int64_t band = begin; band < end; ++band) {
        scatter_band(plan, job, c, ahead, band, lo, hi);
        const int64_t row = band * plan.scatter_rows;
        store(c, c.sums, row, imin(p.rows, row + plan.scatter_rows));
      }
    }
  }
}

// The same, one output row after the other over all pixels of an image row.
void run_long_rows(const Product& p, const ProductPlan& plan, const ProductLists& lists,
                   const Slab& t, const float* tile, RowsCall& c, Ahead& ahead, int64_t begin,
                   int64_t end) {
  c.starts = lists.starts;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t i = t.i0; i < t.i0 + t.rows; ++i) {
      const int64_t top = i * p.step_y + p.dy_first;
      taps_inside(p, top, c.seg_lo, c.seg_hi);
      c.x = tile + (top - t.y0) * plan.slab.row_pitch;
      const int64_t pixel = (p.first_y + i * p.every_y) * p.dst_width + p.first_x + t.j0;
      c.out = p.dst + pixel * p.src.batch;
      long_row(c, lists.chunks, k, t.cols * p.src.batch);
      ahead.fetch();
    }
  }
}

// Work items: (lane group, strip, range of slabs, range of chunks).
struct Items {
  int64_t slabs, parts, splits;
  int64_t count(const ProductPlan& plan) const {
    return plan.lane_groups * plan.strips * parts * splits;
  }
};

// `chunks`: of rows, which can be cut.
Items cut(const Product& p, const ProductPlan& plan, int64_t chunks, int threads) {
  Items items;
  items.slabs = ceil_div(p.out_h, plan.rows_h);
  const int64_t columns = plan.lane_groups * plan.strips;
  items.parts = imin(items.slabs, ceil_div(4 * threads, columns));
  if (threads == 1) items.parts = 1;
  // Too few slabs for the threads: cut the rows too, at the price of packing more than once.
  const int64_t tiles = columns * items.parts;
  items.splits = 1;
  while (items.splits < chunks && tiles * items.splits < 4 * threads &&
         (tiles * items.splits) % threads != 0)
    ++items.splits;
  return items;
}

void run_item(const Product& p, const ProductPlan& plan, const ProductLists& lists,
              const ScatterJob* scatter, const Items& items, int64_t index, float* tile,
              RowsCall& c, bool stream) {
  const int64_t split = index % items.splits;
  index /= items.splits;
  const int64_t group = index % plan.lane_groups;
  index /= plan.lane_groups;
  const int64_t strip = index % plan.strips, part = index / plan.strips;
  Slab t{}, old{};
  t.n0 = group * plan.slab.lanes;
  t.j0 = plan.strip_begin(p, strip);
  t.cols = plan.strip_begin(p, strip + 1) - t.j0;
  c.valid = imin<int64_t>(plan.slab.lanes, p.src.batch - t.n0);
  c.stream = stream && c.valid == plan.slab.lanes;
  const int64_t first = lists.count * split / items.splits;
  const int64_t last = lists.count * (split + 1) / items.splits;
  const int64_t end_slab = items.slabs * (part + 1) / items.parts;
  for (int64_t slab = items.slabs * part / items.parts; slab < end_slab; ++slab) {
    const int64_t i0 = slab * plan.rows_h;
    locate_rows(p, t, i0, imin(plan.rows_h, p.out_h - i0));
    fill_slab(p, plan, old, t, tile);
    Ahead ahead;
    if (slab + 1 < end_slab && !plan.gapless) {
      Slab next = t;
      locate_rows(p, next, i0 + plan.rows_h, imin(plan.rows_h, p.out_h - i0 - plan.rows_h));
      const int64_t pixels = scatter ? int64_t(1) << (plan.scatter_log - plan.log_v)
                                     : pixels_at_once(t.cols, 0, plan.log_v);
      const int64_t blocks = plan.long_rows ? 1 : ceil_div(t.cols, pixels);
      const int64_t turns =
          scatter ? scatter->turns(first, last)
                  : (plan.long_rows ? last - first : plan.bands() * ceil_div(last - first, kTurn));
      ahead = Ahead(p, plan, next, imax(t.y1, next.y0), t.rows * blocks * turns);
    }
    if (scatter) {
      scatter_slab(p, plan, *scatter, t, tile, c, ahead, first, last);
      old = t;
      continue;
    }
    if (plan.long_rows) {
      run_long_rows(p, plan, lists, t, tile, c, ahead, first, last);
      old = t;
      continue;
    }
    // Runs of chunks of one height: a single run where the block height is a power of two and
    // divides the rows.
    for (int64_t k = first; k < last;) {
      int64_t end = k + 1;
      while (end < last && lists.chunks[end].log_r == lists.chunks[k].log_r) ++end;
      run_chunks(p, plan, lists, t, tile, c, ahead, k, end);
      k = end;
    }
    old = t;
  }
}

// All items. `scatter` null: chunks of `lists`, which else only counts the bands.
void run_all(const Product& p, const ProductPlan& plan, const ProductLists& lists,
             const ScatterJob* scatter, const float* weights, ScratchLease& lease, int threads) {
  const size_t per_thread = slab_scratch(p, plan) + sums_scratch(p, plan);
  char* scratch = static_cast<char*>(lease.take(size_t(threads) * per_thread));
  const Items items = cut(p, plan, lists.count, threads);
  const bool stream = p.rows * p.dst_height * p.dst_width * p.src.batch * 4 > kStreamBytes &&
                      p.src.batch % kLanes == 0 &&
                      reinterpret_cast<uintptr_t>(p.dst) % kVecBytes == 0;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t thread;
#pragma omp atomic capture
    thread = next++;
    float* tile = reinterpret_cast<float*>(scratch + size_t(thread) * per_thread);
    RowsCall c{};
    c.offsets = lists.offsets;
    c.weights = weights;
    c.weight_stride = int64_t(1) << plan.max_log_r;
    c.segments = plan.band_segs;
    c.sums = reinterpret_cast<float*>(reinterpret_cast<char*>(tile) + slab_scratch(p, plan));
    c.row_stride = p.dst_height * p.dst_width * p.src.batch;
    c.out_step = p.every_x * p.src.batch;
    c.bias = p.bias;
    c.relu = p.relu;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items.count(plan); ++item)
      run_item(p, plan, lists, scatter, items, item, tile, c, stream);
    if (stream) vfence();
  }
}

}  // namespace

RowsKernel rows_kernel_for(int log_r, int log_p, int log_v) {
  switch (log_r) {
    case 0:
      return pick_p<0>(log_p, log_v);
    case 1:
      return pick_p<1>(log_p, log_v);
    case 2:
      return pick_p<2>(log_p, log_v);
    default:
      return pick_p<3>(log_p, log_v);
  }
}

size_t product_scratch(const Product& p, const ProductPlan& plan, int threads) {
  return size_t(threads) * (slab_scratch(p, plan) + sums_scratch(p, plan));
}

void run_product(const Product& p, const ProductPlan& plan, const ProductLists& lists,
                 const float* weights, ScratchLease& lease, int threads) {
  run_all(p, plan, lists, nullptr, weights, lease, threads);
}

void run_scatter(const Product& p, const ProductPlan& plan, const ScatterLists& lists,
                 const float* weights, int64_t stride, ScratchLease& lease, int threads) {
  const ScatterJob job{lists, weights, stride};
  ProductLists bands{};
  bands.count = lists.bands;
  run_all(p, plan, bands, &job, weights, lease, threads);
}

}  // namespace SK_ISA
}  // namespace sk
