// How a product is cut: lanes, pixels, bands, slabs. Costs are cycles per vector, measured on one
// Zen 3 core where docs/kernel-log.md says so; they only have to order the candidates.
#include "long_rows.h"
#include "pattern_check.h"
#include "sparse_product.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kLogAccumulators = kAccumulators == 16 ? 4 : 3;

// A load that is fed to a multiply-add, by the bytes that are read again and again.
double load_cost(double bytes) {
  if (bytes <= 24 * 1024) return 0.6;
  if (bytes <= 48 * 1024) return 0.7;
  if (bytes <= 96 * 1024) return 0.9;
  if (bytes <= 320 * 1024) return 1.1;
  return bytes <= 1024 * 1024 ? 1.5 : 2.0;
}
constexpr double kSumCost = 0.8;   // load or store of a sum that waits between two bands
constexpr double kRowCost = 12.0;  // starting a row: its end is a branch that is not foreseen
constexpr double kPackCost = 3.0;  // packing, mostly waiting for memory
constexpr double kMoveCost = 1.0;  // moving what a slab keeps

// A slab that stays in a 512 KB second-level cache beside lists and sums.
constexpr double kSlabBytes = 320 * 1024;
constexpr double kLargeSlabBytes = 32 << 20;

// Up to so many non-zeros a row, rows run over long runs of pixels (4 to 40: no difference seen).
constexpr double kLongRowEntries = 8;

int log2_floor(int64_t a) {
  int l = 0;
  while ((int64_t(2) << l) <= a) ++l;
  return l;
}

int64_t reach(const Product& p) { return p.dx_last - p.dx_first; }

SlabShape shape_of(const Product& p, int lanes, int64_t h, int64_t w) {
  const int64_t rows = imin(p.src.height, (h - 1) * p.step_y + (p.segments - 1) * p.dy_step + 1);
  return slab_shape(lanes, imax<int64_t>(rows, 1), w, p.step_x, reach(p));
}

// A double: shapes that no memory holds are planned, too, before they are refused.
double slab_bytes(const Product& p, int lanes, int64_t h, int64_t w) {
  return double(p.src_channels) * double(shape_of(p, lanes, h, w).pitch) * 4;
}

// Multiply-adds, sums and row starts of all rows over one pixel block, per vector and row.
double bands_cost(const Product& p, int64_t vectors, double footprint, double per_row,
                  int64_t channels, int64_t segs) {
  const double bands =
      double(ceil_div(p.seg_channels, channels)) * double(ceil_div(p.segments, segs));
  const double sums_bytes = double(p.rows * vectors * kLanes * 4);
  const double sums = sums_bytes <= kSlabBytes ? kSumCost : 2 * kSumCost;
  return per_row * load_cost(double(channels * segs) * footprint) + 2 * (bands - 1) * sums +
         bands * kRowCost / double(vectors);
}

// More bands, or none.
void vary_bands(const Product& p, ProductPlan& plan) {
  if (p.variant == Variant::kOneBand) {
    plan.band_channels = p.seg_channels;
    plan.band_segs = p.segments;
  } else if (p.variant == Variant::kMoreBands) {
    // One of the two is cut at a time, see choose_bands.
    int64_t& cut = plan.band_segs > 1 ? plan.band_segs : plan.band_channels;
    cut = ceil_div(cut, int64_t(2));
  }
}

// Bands so that what one reads for a pixel block stays in a near cache, as long as enough non-zeros
// of a row are left in each to pay for parking the sums.
void choose_bands(const Product& p, ProductPlan& plan, int64_t pixels) {
  const int64_t vectors = pixels << plan.log_v;
  const double footprint =
      double(slab_shape(plan.slab.lanes, 1, pixels, p.step_x, reach(p)).row_pitch) * 4 /
      double(int64_t(1) << plan.max_log_r);  // a chunk of rows shares its loads
  const double per_row = p.per_channel * double(p.src_channels) / double(imax<int64_t>(1, p.rows));
  plan.band_channels = p.seg_channels;
  plan.band_segs = p.segments;
  double best = 1e300;
  auto consider = [&](int64_t channels, int64_t segs) {
    const double cost = bands_cost(p, vectors, footprint, per_row, channels, segs);
    if (cost >= best) return;
    best = cost;
    plan.band_channels = channels;
    plan.band_segs = segs;
  };
  for (int64_t n = 1; n <= p.segments; ++n) consider(p.seg_channels, ceil_div(p.segments, n));
  for (int64_t n = 2; n <= imin<int64_t>(64, p.seg_channels); ++n)
    consider(ceil_div(p.seg_channels, n), 1);
  vary_bands(p, plan);
  plan.channel_bands = ceil_div(p.seg_channels, plan.band_channels);
  plan.seg_bands = ceil_div(p.segments, plan.band_segs);
}

// Filling the slab, reading it into the first-level cache, and the products of pixels that are
// computed twice because blocks overlap; per output pixel and source channel.
double slab_cost(const Product& p, int lanes, int64_t h, int64_t w, int64_t pixels) {
  const SlabShape s = shape_of(p, lanes, h, w);
  const double columns = double(s.phases * s.width) / double(w);
  const double bytes = slab_bytes(p, lanes, h, w);
  const double far = bytes <= kSlabBytes ? 0.3 : (bytes <= 2 << 20 ? 0.5 : 1.0);
  const double fill = double(p.segments) * double(pixels + reach(p)) / double(pixels) * far;
  const double kept = double(imax<int64_t>(0, s.height - h * p.step_y)) / double(h);
  // Without anything to slide to, nothing is kept.
  const double moved = h >= p.out_h ? 0.0 : kMoveCost * columns * kept;
  const double packed = double(h >= p.out_h ? s.height : imin(s.height, h * p.step_y)) / double(h);
  const double twice = double(round_up(w, pixels) - w) / double(w) * p.per_channel * 0.7;
  return kPackCost * columns * packed + moved + fill + twice;
}

// Half or twice the rows, or where that cannot be, half or twice the width.
void vary_slab(const Product& p, ProductPlan& plan, int64_t pixels) {
  const auto even = [&](int64_t h) { return ceil_div(p.out_h, ceil_div(p.out_h, h)); };
  if (p.variant == Variant::kHalfSlab) {
    if (plan.rows_h > 1) {
      plan.rows_h = even(plan.rows_h / 2);
    } else if (p.out_w / (2 * plan.strips) >= pixels) {
      plan.strips *= 2;
    }
  } else if (p.variant == Variant::kDoubleSlab) {
    const bool taller = plan.rows_h < p.out_h;
    const int64_t h = taller ? even(imin(p.out_h, 2 * plan.rows_h)) : plan.rows_h;
    const int64_t strips = taller ? plan.strips : ceil_div(plan.strips, int64_t(2));
    if (slab_bytes(p, plan.slab.lanes, h, ceil_div(p.out_w, strips)) > kLargeSlabBytes) return;
    plan.rows_h = h;
    plan.strips = strips;
  }
}

void choose_slab(const Product& p, ProductPlan& plan, int64_t pixels) {
  const int lanes = plan.slab.lanes;
  const double least = slab_bytes(p, lanes, 1, pixels);
  const double limit = imax(kSlabBytes, imin(4 * least, imax(kLargeSlabBytes, 2 * least)));
  double best = 1e300;
  plan.strips = imax<int64_t>(1, p.out_w / pixels);
  plan.rows_h = 1;
  for (int64_t strips = 1; strips <= p.out_w && p.out_w / strips >= pixels; ++strips) {
    const int64_t w = ceil_div(p.out_w, strips);
    for (int64_t h = 1; h <= p.out_h; ++h) {
      if (slab_bytes(p, lanes, h, w) > limit) break;
      const int64_t even = ceil_div(p.out_h, ceil_div(p.out_h, h));  // slabs of equal height
      if (even != h) continue;
      const double cost = slab_cost(p, lanes, h, w, pixels);
      if (cost >= best) continue;
      best = cost;
      plan.strips = strips;
      plan.rows_h = h;
    }
  }
  vary_slab(p, plan, pixels);
  plan.strip_w = ceil_div(p.out_w, plan.strips);
  plan.slab = shape_of(p, lanes, plan.rows_h, plan.strip_w);
}

// log2 of the highest chunk: as many rows as share their non-zeros, but so that a pass over the
// lists serves four vectors of each row, if the image's width divides into blocks of as many
// pixels. Lists are read again for every block, and an entry of four rows has 20 bytes: four rows
// by two vectors were 5 % slower than two by four, in 1x1 convolutions 30 %.
int highest_chunk(const Product& p, int64_t block_rows_at_once, int log_v) {
  constexpr int kSharing = kLogAccumulators - 2;
  const int64_t pixels = int64_t(kAccumulators) >> imin(kLogAccumulators, kSharing + log_v);
  const int most = p.out_w % pixels == 0 ? kSharing : kMaxLog;
  return imin(imin(most, log2_floor(block_rows_at_once)), kLogAccumulators - log_v);
}

// Output rows whose sums stay in the first-level cache beside the source channels in use.
constexpr int64_t kScatterRows = 256;
// Entries of a run on average: shorter ones do not pay for their loads and their loop end.
constexpr double kLeastRun = 6.0;
// Blocks of an output row on average: its sums are loaded and cleared once more than in a gather.
constexpr double kLeastBlocks = 10.0;

bool scatter_pays(const Product& p, const ProductPlan& plan) {
  const int64_t groups = p.src_channels / imax<int64_t>(1, p.seg_channels);
  const int64_t reached = ceil_div(ceil_div(p.rows, groups), plan.scatter_rows);
  if (p.per_channel < kLeastRun * double(p.taps_x * p.segments * reached)) return false;
  const double per_row = p.per_channel * double(p.src_channels) / double(imax<int64_t>(1, p.rows));
  return per_row >= kLeastBlocks * double(p.source_block);
}

// Whether to scatter, see scatter_rows.h; then lanes and blocks for it.
bool choose_scatter(const Product& p, ProductPlan& plan, int line_log) {
  if (!kCanScatter || p.source_block < kMaxGroup || p.taps_x < 1) return false;
  if (p.variant == Variant::kPixelBlocks || p.variant == Variant::kLongRows) return false;
  const int64_t vectors_there = ceil_div(p.src.batch, kLanes);
  int log_v = imin(line_log, log2_floor(vectors_there));
  while (log_v < kScatterLog && (p.out_w << log_v) < (1 << kScatterLog) &&
         (int64_t(1) << log_v) < vectors_there)
    ++log_v;
  plan.scatter_log = log_v + imin(kScatterLog - log_v, log2_floor(p.out_w));
  plan.scatter_rows = ceil_div(p.rows, ceil_div(p.rows, kScatterRows));
  if (p.variant != Variant::kScatterRows && !scatter_pays(p, plan)) return false;
  plan.log_v = log_v;
  plan.max_log_r = 0;
  return true;
}

// log2 of the vectors per pixel: what the variant says, as far as batch and registers go, else
// `log_v`.
int vary_vectors(const Product& p, ProductPlan& plan, int log_v, int64_t block_rows_at_once) {
  const int asked = int(p.variant) - int(Variant::kOneVector);
  if (p.variant < Variant::kOneVector || p.variant > Variant::kFourVectors) return log_v;
  log_v = 0;
  while (log_v < asked && (int64_t(kLanes) << log_v) < p.src.batch) ++log_v;
  plan.max_log_r = imin(imin(kMaxLog, log2_floor(block_rows_at_once)), kLogAccumulators - log_v);
  return log_v;
}

}  // namespace

uint64_t plan_print(const ProductPlan& plan) {
  const int64_t fields[] = {plan.slab.lanes,
                            plan.slab.row_pitch,
                            plan.log_v,
                            plan.max_log_r,
                            plan.rows_h,
                            plan.strips,
                            plan.gapless,
                            plan.long_rows,
                            plan.band_channels,
                            plan.band_segs,
                            plan.scatter,
                            plan.scatter ? plan.scatter_rows : 0,
                            plan.scatter ? plan.scatter_log : 0};
  uint64_t print = 0;
  for (const int64_t field : fields) print = mix_print(print, field);
  return print;
}

int64_t pixels_at_once(int64_t width, int log_r, int log_v) {
  return pow2_floor(
      imin(width, imin<int64_t>(int64_t(1) << kMaxLog, kAccumulators >> (log_r + log_v))));
}

ProductPlan plan_product(const Product& p, const ConvGeometry& g, int64_t block_rows_at_once) {
  check_tile(slab_bytes(p, kLanes, 1, 1) / 4, g);  // what no candidate can go below
  ProductPlan plan{};
  // Full cache lines per pixel where the batch has them: half lines are poor to stream and to pack.
  const int line_log = kLanes == 4 ? 2 : (kLanes == 8 ? 1 : 0);
  int log_v = imin(line_log, log2_floor(ceil_div(p.src.batch, kLanes)));
  if (log_v < line_log && (kLanes << log_v) < p.src.batch) ++log_v;
  plan.max_log_r = highest_chunk(p, block_rows_at_once, log_v);
  // Narrow images cannot fill the registers with pixels; take more of the batch.
  while (log_v < kMaxLog && plan.max_log_r + log_v + 1 <= kLogAccumulators &&
         (p.out_w << (log_v + plan.max_log_r)) < kAccumulators &&
         (int64_t(kLanes) << log_v) < p.src.batch)
    ++log_v;
  // Pixels that lie apart, in the source or in the output: longer pieces of each, if the slab
  // allows.
  while ((p.every_x > 1 || p.step_x > 1) && log_v < kMaxLog &&
         plan.max_log_r + log_v + 1 <= kLogAccumulators &&
         (int64_t(kLanes) << log_v) < p.src.batch &&
         slab_bytes(p, kLanes << (log_v + 1), 1, 1) <= kSlabBytes / 2)
    ++log_v;
  log_v = vary_vectors(p, plan, log_v, block_rows_at_once);
  plan.log_v = log_v;
  plan.scatter = choose_scatter(p, plan, line_log);
  log_v = plan.log_v;
  plan.slab.lanes = kLanes << log_v;
  const int64_t pixels = pixels_at_once(p.out_w, plan.max_log_r, log_v);
  const double per_row = p.per_channel * double(p.src_channels) / double(imax<int64_t>(1, p.rows));
  plan.gapless = p.src.batch == kLongStep && p.step_x == 1 && plan.slab.lanes == kLongStep;
  plan.long_rows = !plan.scatter && plan.gapless && p.every_x == 1 && plan.max_log_r == 0 &&
                   p.variant != Variant::kPixelBlocks &&
                   (per_row <= kLongRowEntries || p.variant == Variant::kLongRows);
  choose_bands(p, plan, pixels);
  if (plan.long_rows) {
    plan.band_channels = p.seg_channels;
    plan.band_segs = p.segments;
    plan.channel_bands = plan.seg_bands = 1;
  }
  choose_slab(p, plan, pixels_at_once(p.out_w, 0, log_v));
  // Offsets reach below a slab that the image's edge cut short.
  check_tile(double(p.src_channels) * double(plan.slab.pitch) +
                 double((p.segments - 1) * p.dy_step) * double(plan.slab.row_pitch),
             g);
  plan.lane_groups = ceil_div(p.src.batch, plan.slab.lanes);
  return plan;
}

}  // namespace SK_ISA
}  // namespace sk
