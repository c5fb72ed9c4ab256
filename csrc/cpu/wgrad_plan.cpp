#include "wgrad_plan.h"

#include "pattern_check.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kMaxParts = 8;
constexpr int64_t kMaxBands = 32;  // bounds the table of lists: rows x bands
constexpr int64_t kMinRun = 4096;  // floats; runs of half of that were 8 % slower

// Costs in nanoseconds on one core of the machine of docs/kernel-log.md (AVX2), for vectors of the
// batch. Only their ratios matter.
constexpr double kFmaCost = 0.42;       // one product, its input read from the second-level cache
constexpr double kRegisterShare = 0.4;  // the part of it that a second gradient row costs again
constexpr double kSumCost = 0.8;        // summing up one stored element in one tile
constexpr double kGroupCost = 25;       // starting one group of elements in one tile
constexpr double kRowCost = 40;         // starting one block row in one tile
constexpr double kLoadCost = 1.5;       // the first load of one vector in a tile, from memory
constexpr double kSecondLevelBytes = 288 * 1024, kThirdLevelBytes = 4 << 20;
constexpr double kThirdLevelCost = 1.6, kMemoryCost = 5;  // times kFmaCost, beyond those sizes

struct Candidate {
  int64_t bands, h, w;
};

int64_t rows_read(const ConvGeometry& g, int64_t h) {
  return imin(g.in_h, (h - 1) * g.stride_h + (g.kh - 1) * g.dil_h + 1);
}
int64_t columns_read(const ConvGeometry& g, int64_t w) {
  return imin(g.in_w, (w - 1) * g.stride_w + (g.kw - 1) * g.dil_w + 1);
}

// Share of the taps' pixels that lie inside the image along one dimension.
double coverage(int64_t out, int64_t in, int64_t stride, int64_t pad, int64_t kernel, int64_t dil) {
  int64_t inside = 0;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t d = k * dil - pad;
    const int64_t lo = imax<int64_t>(0, ceil_div(imax<int64_t>(0, -d), stride));
    const int64_t hi = imin(out, floor_div(in - 1 - d, stride) + 1);
    inside += imax<int64_t>(0, hi - lo);
  }
  return double(inside) / double(out * kernel);
}

bool has_border(const ConvGeometry& g) {
  return g.pad_top > 0 || g.pad_left > 0 || g.pad_bottom > 0 || g.pad_right > 0;
}

double reread_cost(double bytes) {
  if (bytes <= kSecondLevelBytes) return 1.0;
  return bytes <= kThirdLevelBytes ? kThirdLevelCost : kMemoryCost;
}

// Nanoseconds of all tiles.
double cost_of(const ConvGeometry& g, int64_t bh, double per_row, double inside,
               const Candidate& c) {
  const int rows = pow2_floor(imin<int64_t>(bh, kMaxGradRows));
  const double stored = double(g.out_channels) * per_row;
  const double keys = double(c.bands * (has_border(g) ? g.kh * g.kw : 1));
  const double row_visits = double(g.out_channels * c.bands) / rows;
  // The last group of a key is half full on average.
  const double groups =
      double(g.out_channels) / rows * imin(per_row, per_row / max_columns(rows) + 0.5 * keys);
  const double out_vectors = double(c.h) * double(g.stride_w > 1 ? c.w * ceil_div(g.batch, kLanes)
                                                                 : ceil_div(c.w * g.batch, kLanes));
  const double in_vectors =
      double(rows_read(g, c.h)) * double(ceil_div(columns_read(g, c.w) * g.batch, kLanes));
  const double band = double(ceil_div(g.in_channels, c.bands));
  const double reread = reread_cost(4.0 * kLanes * in_vectors * band);
  const double fma = kFmaCost * stored * inside * out_vectors *
                     (kRegisterShare + (1 - kRegisterShare) * reread / rows);
  const double start = kSumCost * stored + kGroupCost * groups + kRowCost * row_visits;
  const double load = kLoadCost * (in_vectors * double(g.in_channels) +
                                   out_vectors * double(g.out_channels * c.bands));
  return double(ceil_div(g.out_h, c.h) * ceil_div(g.out_w, c.w)) * (fma + start + load);
}

Candidate choose(const ConvGeometry& g, int64_t bh, double per_row) {
  const double inside = coverage(g.out_h, g.in_h, g.stride_h, g.pad_top, g.kh, g.dil_h) *
                        coverage(g.out_w, g.in_w, g.stride_w, g.pad_left, g.kw, g.dil_w);
  Candidate best{1, g.out_h, g.out_w};
  double best_cost = 1e300;
  for (int64_t bands = 1; bands <= imin(kMaxBands, g.in_channels); bands *= 2) {
    for (int64_t w = g.out_w;; w = ceil_div(w, 2)) {
      for (int64_t h = g.out_h;; h = ceil_div(h, 2)) {
        const double cost = cost_of(g, bh, per_row, inside, {bands, h, w});
        if (cost < best_cost) {
          best_cost = cost;
          best = {bands, h, w};
        }
        if (h == 1) break;
      }
      if (w == 1 || ceil_div(w, 2) * g.batch < kMinRun) break;
    }
  }
  return best;
}

void vary(const ConvGeometry& g, Variant variant, Candidate& c) {
  if (variant == Variant::kFewerBands) {
    c.bands = imax<int64_t>(1, c.bands / 2);
  } else if (variant == Variant::kMoreBands) {
    c.bands = imin(imin(kMaxBands, g.in_channels), 2 * c.bands);
  } else if (variant == Variant::kHalfTiles) {
    int64_t& side = c.h > 1 ? c.h : c.w;
    side = ceil_div(side, int64_t(2));
  } else if (variant == Variant::kDoubleTiles) {
    int64_t& side = c.h < g.out_h ? c.h : c.w;
    side = imin(2 * side, &side == &c.h ? g.out_h : g.out_w);
  }
}

}  // namespace

uint64_t plan_print(const WgradPlan& plan) {
  return mix_print(mix_print(mix_print(0, plan.band_channels), plan.tile_h), plan.tile_w);
}

WgradTile WgradPlan::locate(const ConvGeometry& g, int64_t index) const {
  WgradTile t;
  t.i0 = index / tiles_x * tile_h;
  t.rows = imin(tile_h, g.out_h - t.i0);
  t.j0 = index % tiles_x * tile_w;
  t.cols = imin(tile_w, g.out_w - t.j0);
  return t;
}

KeyRegion WgradPlan::region(const ConvGeometry& g, const WgradTile& t, int64_t key) const {
  int64_t i0 = t.i0, i1 = t.i0 + t.rows, j0 = t.j0, j1 = t.j0 + t.cols;
  const int64_t dy = key % g.kh * g.dil_h - g.pad_top, dx = key / g.kh * g.dil_w - g.pad_left;
  i0 = imax(i0, ceil_div(imax<int64_t>(0, -dy), g.stride_h));
  i1 = imin(i1, floor_div(g.in_h - 1 - dy, g.stride_h) + 1);
  j0 = imax(j0, ceil_div(imax<int64_t>(0, -dx), g.stride_w));
  j1 = imin(j1, floor_div(g.in_w - 1 - dx, g.stride_w) + 1);
  KeyRegion k{};
  k.begin = key;
  k.end = key + 1;
  if (i0 >= i1 || j0 >= j1) return k;
  const bool one_piece = g.stride_w == 1 || j1 - j0 == 1;
  DotRegion& d = k.dots;
  d.lines = i1 - i0;
  d.steps = one_piece ? 1 : j1 - j0;
  d.run = (one_piece ? j1 - j0 : 1) * pixel;
  d.grad_line = grad_row;
  d.x_line = g.stride_h * x_row;
  d.x_step = g.stride_w * pixel;
  d.grad_channel = grad_channel;
  k.grad_at = i0 * grad_row + j0 * pixel;
  k.x_at = i0 * g.stride_h * x_row + j0 * g.stride_w * pixel;
  // Lines without gaps on both sides become one.
  if (d.steps == 1 && d.run == d.grad_line && d.run == d.x_line) {
    d.run *= d.lines;
    d.lines = 1;
  }
  return k;
}

int64_t WgradPlan::list_regions(const ConvGeometry& g, const WgradTile& t,
                                KeyRegion* regions) const {
  int64_t count = 0;
  for (int64_t key = 0; key < keys; ++key) {
    const KeyRegion k = region(g, t, key);
    if (k.dots.lines == 0) continue;
    KeyRegion* last = count > 0 ? regions + count - 1 : nullptr;
    if (last && last->end == key && last->grad_at == k.grad_at &&
        last->dots.lines == k.dots.lines && last->dots.run == k.dots.run &&
        last->dots.steps == k.dots.steps) {
      last->end = k.end;
    } else {
      regions[count++] = k;
    }
  }
  return count;
}

WgradPlan plan_wgrad(const ConvGeometry& g, int64_t bh, double per_row, Variant variant) {
  Candidate best = choose(g, bh, per_row);
  vary(g, variant, best);
  WgradPlan plan;
  plan.pixel = g.batch;
  plan.x_row = g.in_w * g.batch;
  plan.x_channel = g.in_h * plan.x_row;
  plan.grad_row = g.out_w * g.batch;
  plan.grad_channel = g.out_h * plan.grad_row;
  plan.band_channels = ceil_div(g.in_channels, best.bands);
  plan.bands = ceil_div(g.in_channels, plan.band_channels);
  // Lists hold offsets in pixels; a tap shifts by less than one image either way.
  check_tile(double(plan.band_channels + 1) * double(g.in_h) * double(g.in_w), g);
  plan.tile_h = best.h;
  plan.tile_w = best.w;
  plan.tiles_y = ceil_div(g.out_h, best.h);
  plan.tiles_x = ceil_div(g.out_w, best.w);
  plan.tiles = plan.tiles_y * plan.tiles_x;
  plan.taps = g.kh * g.kw;
  plan.keys = has_border(g) ? plan.taps : 1;
  // A part costs one pass over partial values: few parts where little work stands behind each
  // value.
  const int64_t worth = imax<int64_t>(1, g.batch * g.out_h * g.out_w / 512);
  plan.parts = imin(imin(plan.tiles, kMaxParts), worth);
  return plan;
}

}  // namespace SK_ISA
}  // namespace sk
