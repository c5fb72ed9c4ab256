#include "sparse_product.h"

#include "pattern_check.h"

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

int log2_floor(int64_t a) {
  int l = 0;
  while ((int64_t(2) << l) <= a) ++l;
  return l;
}

// Half of a 512 KB second-level cache: the other half is for the lists and the output on its way
// out.
constexpr int64_t kTileBytes = 288 * 1024;
// Outputs larger than this do not survive in the caches until their reader comes: write them past
// the caches.
constexpr int64_t kStreamBytes = 12 << 20;
// Beyond kTileBytes: costs relative to a multiply-add from the second-level cache, estimated.
constexpr double kSpillCost = 1.5;  // at once, and up to 1 more over the next kSpillBytes
constexpr double kPackCost = 2.0;   // packing one vector
constexpr int64_t kSpillBytes = 1 << 20;
constexpr int64_t kLargeTileBytes = 32 << 20;
constexpr int kLogAccumulators = kAccumulators == 16 ? 4 : 3;

// Output pixels that one kernel call keeps in registers.
int pixels_at_once(int64_t width, int log_r, int log_v) {
  return pow2_floor(
      imin(width, imin<int64_t>(int64_t(1) << kMaxLog, kAccumulators >> (log_r + log_v))));
}

TileShape band_shape(const Product& p, int lanes, int64_t h, int64_t w) {
  const int64_t rows = imin(p.src.height, (h - 1) * p.step_y + (p.segments - 1) * p.dy_step + 1);
  const int64_t cols = (w - 1) * p.step_x + p.dx_last - p.dx_first + 1;
  return tile_shape(lanes, imax<int64_t>(rows, 1), cols);
}

// A double: shapes that no memory holds are planned, too, before they are refused.
double tile_bytes(const Product& p, int lanes, int64_t h, int64_t w) {
  return double(p.src_channels) * double(band_shape(p, lanes, h, w).pitch) * 4;
}

// Most bytes that a band may take whose cost says so: where a row of few pixels is beyond the
// second-level cache anyway (deep layers, large dilations), packing the same window for every few
// pixels may cost far more than missing it.
double most_bytes(double least) {
  return imax(double(kTileBytes), imin(8 * least, imax(double(kLargeTileBytes), 2 * least)));
}

// Multiply-adds and packing per output pixel and source channel, in multiply-adds.
double band_cost(const Product& p, int lanes, int64_t h, int64_t w) {
  const double over = tile_bytes(p, lanes, h, w) - double(kTileBytes);
  const double spill = over <= 0 ? 1.0 : kSpillCost + imin(1.0, over / double(kSpillBytes));
  const TileShape s = band_shape(p, lanes, h, w);
  return spill * p.per_channel + kPackCost * double(s.height * s.width) / double(h * w);
}

// The band of the least cost; at least one row of `min_w` pixels.
void choose_band(const Product& p, int lanes, int64_t min_w, int64_t& band_h, int64_t& band_w) {
  band_h = 1;
  band_w = min_w;
  double best = 1e300;
  // What fits the cache, and what may be worth missing it.
  const double limits[] = {double(kTileBytes), most_bytes(tile_bytes(p, lanes, 1, min_w))};
  for (int64_t w = min_w; w <= p.out_w; w = w == p.out_w ? w + 1 : imin(p.out_w, 2 * w)) {
    for (const double limit : limits) {
      int64_t h = 1;
      while (h < p.out_h && tile_bytes(p, lanes, h + 1, w) <= limit) ++h;
      if (tile_bytes(p, lanes, h, w) > limit && w > min_w) continue;
      h = ceil_div(p.out_h, ceil_div(p.out_h, h));  // bands of equal height
      const double cost = band_cost(p, lanes, h, w);
      if (cost < best) {
        best = cost;
        band_h = h;
        band_w = w;
      }
    }
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

ProductPlan plan_product(const Product& p, const ConvGeometry& g, int64_t block_rows_at_once) {
  check_tile(tile_bytes(p, kLanes, 1, 1) / 4, g);  // what no candidate can go below
  ProductPlan plan;
  // Full cache lines per pixel where the batch has them: half lines are poor to stream and to pack.
  const int line_log = kLanes == 4 ? 2 : (kLanes == 8 ? 1 : 0);
  int log_v = imin(line_log, log2_floor(ceil_div(p.src.batch, kLanes)));
  if (log_v < line_log && (kLanes << log_v) < p.src.batch) ++log_v;
  plan.max_log_r = imin(imin(kMaxLog, log2_floor(block_rows_at_once)), kLogAccumulators - log_v);
  // Narrow images cannot fill the registers with pixels; take more of the batch, as long as the
  // tile stays in cache.
  while (log_v < kMaxLog && plan.max_log_r + log_v + 1 <= kLogAccumulators &&
         (p.out_w << (log_v + plan.max_log_r)) < kAccumulators &&
         (int64_t(kLanes) << log_v) < p.src.batch &&
         tile_bytes(p, kLanes << (log_v + 1), 1, p.out_w) <= kTileBytes)
    ++log_v;
  plan.log_v = log_v;
  const int lanes = kLanes << log_v;
  const int64_t min_w = pixels_at_once(p.out_w, 0, log_v);
  choose_band(p, lanes, min_w, plan.band_h, plan.band_w);
  plan.tile = band_shape(p, lanes, plan.band_h, plan.band_w);
  // Offsets reach below a tile that the image's edge cut short.
  check_tile(double(p.src_channels) * double(plan.tile.pitch) +
                 double((p.segments - 1) * p.dy_step) * double(plan.tile.row_pitch),
             g);
  plan.lane_groups = ceil_div(p.src.batch, lanes);
  plan.bands_y = ceil_div(p.out_h, plan.band_h);
  plan.bands_x = ceil_div(p.out_w, plan.band_w);
  return plan;
}

namespace {

size_t tile_scratch(const Product& p, const ProductPlan& plan) {
  // 64 bytes of slack: a tile's base is 64-byte aligned, and vectors never leave a channel's pitch.
  return ScratchLease::padded(size_t(p.src_channels) * size_t(plan.tile.pitch) * 4);
}
size_t block_scratch(const ProductPlan& plan) {
  return ScratchLease::padded(size_t(plan.band_h * plan.band_w) * sizeof(PixelBlock));
}

// Where the tile of one work item lies.
struct Item {
  int64_t n0, i0, rows, j0, cols, y0, y1;
};

Item locate(const Product& p, const ProductPlan& plan, int64_t group, int64_t band_y,
            int64_t band_x) {
  Item t;
  t.n0 = group * plan.tile.lanes;
  t.i0 = band_y * plan.band_h;
  t.rows = imin(plan.band_h, p.out_h - t.i0);
  // The last band is as wide as the others and overlaps its neighbour: every pixel is computed by a
  // kernel of the same shape, so that its sum does not depend on how the image was cut.
  t.j0 = imin(band_x * plan.band_w, p.out_w - plan.band_w);
  t.cols = plan.band_w;
  const int64_t top = t.i0 * p.step_y + p.dy_first;
  const int64_t bottom = (t.i0 + t.rows - 1) * p.step_y + p.dy_first + (p.segments - 1) * p.dy_step;
  t.y0 = imin(imax<int64_t>(top, 0), p.src.height);
  t.y1 = imax(t.y0, imin(bottom + 1, p.src.height));
  return t;
}

// Blocks of `width` pixels that cover the item; the last of a row overlaps the one before it.
int64_t list_blocks(const Product& p, const ProductPlan& plan, const Item& t, int64_t width,
                    PixelBlock* blocks) {
  int64_t n = 0;
  for (int64_t i = t.i0; i < t.i0 + t.rows; ++i) {
    const int64_t top = i * p.step_y + p.dy_first;
    const int64_t lo =
        imin(p.segments, imax<int64_t>(0, ceil_div(imax<int64_t>(0, -top), p.dy_step)));
    const int64_t below = p.src.height - 1 - top;  // highest dy - dy_first inside the image
    const int64_t hi = imax(lo, imin(p.segments, floor_div(below, p.dy_step) + 1));
    for (int64_t j = 0; j < t.cols; j += width) {
      const int64_t at = imin(j, t.cols - width);
      PixelBlock& b = blocks[n++];
      b.tile = (top - t.y0) * plan.tile.row_pitch + at * p.step_x * plan.tile.lanes;
      b.out = ((p.first_y + i * p.every_y) * p.dst_width + p.first_x + (t.j0 + at) * p.every_x) *
                  p.src.batch +
              t.n0;
      b.seg_lo = int32_t(lo);
      b.seg_hi = int32_t(hi);
    }
  }
  return n;
}

void run_tile(const Product& p, const ProductPlan& plan, const ProductLists& lists, const Item& t,
              int64_t split, int64_t splits, float* tile, PixelBlock* blocks, bool stream) {
  pack_tile(tile, plan.tile, p.src, 0, p.src_channels, t.y0, t.y1 - t.y0,
            t.j0 * p.step_x + p.dx_first, t.n0);
  RowsContext c;
  c.tile = tile;
  c.pixel_step = p.step_x * plan.tile.lanes;
  c.words = lists.words;
  c.segments = lists.segments;
  c.seg_stride = p.segments + 1;
  c.out = p.dst;
  c.row_stride = p.dst_height * p.dst_width * p.src.batch;
  c.out_step = p.every_x * p.src.batch;
  c.bias = p.bias;
  c.relu = p.relu;
  c.valid = imin<int64_t>(plan.tile.lanes, p.src.batch - t.n0);
  c.stream = stream && c.valid == plan.tile.lanes;
  const int64_t first = lists.count * split / splits;
  const int64_t last = lists.count * (split + 1) / splits;
  // Runs of chunks of one height: a single run where the block height is a power of two and divides
  // the rows.
  for (int64_t k = first; k < last;) {
    int64_t end = k + 1;
    while (end < last && lists.chunks[end].log_r == lists.chunks[k].log_r) ++end;
    const int log_r = lists.chunks[k].log_r;
    const int64_t width = pixels_at_once(t.cols, log_r, plan.log_v);
    const int64_t n = list_blocks(p, plan, t, width, blocks);
    const RowsKernel kernel = rows_kernel_for(log_r, log2_floor(width), plan.log_v);
    kernel(c, lists.chunks, k, end, blocks, 0, n);
    k = end;
  }
}

void run_item(const Product& p, const ProductPlan& plan, const ProductLists& lists, int64_t index,
              int64_t split, int64_t splits, float* tile, PixelBlock* blocks, bool stream) {
  const int64_t group = index % plan.lane_groups, band = index / plan.lane_groups;
  const int64_t y = band / plan.items_x(p), x = band % plan.items_x(p);
  run_tile(p, plan, lists, locate(p, plan, group, y, x), split, splits, tile, blocks, stream);
  // The overlap is written twice, by one thread: two would race.
  if (x + 2 == plan.bands_x && plan.overlaps(p))
    run_tile(p, plan, lists, locate(p, plan, group, y, x + 1), split, splits, tile, blocks, stream);
}

}  // namespace

size_t product_scratch(const Product& p, const ProductPlan& plan, int threads) {
  return size_t(threads) * (tile_scratch(p, plan) + block_scratch(plan));
}

void run_product(const Product& p, const ProductPlan& plan, const ProductLists& lists,
                 ScratchLease& lease, int threads) {
  const size_t per_thread = tile_scratch(p, plan) + block_scratch(plan);
  char* scratch = static_cast<char*>(lease.take(size_t(threads) * per_thread));
  const int64_t tiles = plan.lane_groups * plan.bands_y * plan.items_x(p);
  // Too few tiles for the threads: cut the rows too, at the price of packing a tile more than once.
  int64_t splits = 1;
  while (splits < lists.count && tiles * splits < 4 * threads && (tiles * splits) % threads != 0)
    ++splits;
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
    PixelBlock* blocks =
        reinterpret_cast<PixelBlock*>(reinterpret_cast<char*>(tile) + tile_scratch(p, plan));
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < tiles * splits; ++item)
      run_item(p, plan, lists, item / splits, item % splits, splits, tile, blocks, stream);
    if (stream) vfence();
  }
}

}  // namespace SK_ISA
}  // namespace sk
