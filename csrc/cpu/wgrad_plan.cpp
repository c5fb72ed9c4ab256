#include "wgrad_plan.h"

#include "pattern_check.h"

#ifdef WG_TUNE
#include <cstdio>
#include <cstdlib>
#endif
namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kTileBytes = 288 * 1024;  // half of a 512 KB second-level cache and a little more
constexpr int64_t kLargeTileBytes = 32 << 20;
constexpr int64_t kMaxParts = 8;
constexpr int64_t kMaxBands = 32;  // bounds the key table: rows x bands

// Costs in nanoseconds on one core of the machine of docs/kernel-log.md (AVX2), for vectors of the
// batch. Only their ratios matter.
constexpr double kFmaCost = 0.42;       // one product, its input read from the second-level cache
constexpr double kRegisterShare = 0.4;  // the part of it that a second gradient row costs again
constexpr double kVisitCost = 0.8;      // summing up one stored element in one tile
constexpr double kGroupCost = 25;       // starting one group of elements in one tile
constexpr double kRowCost = 40;         // starting one block row in one tile
// Packing one vector: mostly the wait for memory, longer for shorter pieces.
constexpr double kPackCost = 2.5, kPackPieceCost = 3.5;  // + the second times 16 lanes / lanes
constexpr double kStreamCost = 1.5;  // loading one vector that lies in a long run
constexpr double kSpillCost = 2.5;        // a packed tile beyond the budget
constexpr double kDirectSpillCost = 1.6;  // whole channels come from the third level nearly as fast
constexpr double kSharedCacheBytes = 4 << 20;  // what may be taken of that

struct Candidate {
  bool clip_y, clip_x, direct;
  int64_t lanes, bands, h, w;
};

struct Weight {
  int64_t bh, bw;
  double per_row;  // stored elements per row of the matrix
  double inside_y, inside_x;
};

int64_t span(int64_t outputs, int64_t stride, int64_t kernel, int64_t dil) {
  return (outputs - 1) * stride + (kernel - 1) * dil + 1;
}

TileShape shape_of(const ConvGeometry& g, const Candidate& c) {
  if (c.direct) {
    const int64_t row = g.in_w * g.batch;
    return {int(c.lanes), g.in_h, g.in_w, row, g.in_h * row};
  }
  const int64_t h = span(c.h, g.stride_h, g.kh, g.dil_h), w = span(c.w, g.stride_w, g.kw, g.dil_w);
  return tile_shape(int(c.lanes), c.clip_y ? imin(h, g.in_h) : h, c.clip_x ? g.in_w : w);
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

// Input rows that one tile reads.
int64_t rows_read(const ConvGeometry& g, const Candidate& c) {
  return imin(g.in_h, span(c.h, g.stride_h, g.kh, g.dil_h));
}
// The input of one band and the gradient rows. A double: shapes that no memory holds are planned,
// too, before they are refused.
double bytes_of(const ConvGeometry& g, const Weight& w, const Candidate& c) {
  const int64_t channels = ceil_div(g.in_channels, c.bands) + w.bw - 1;
  if (c.direct)
    return 4 * double(imin(channels, g.in_channels)) * double(rows_read(g, c) * g.in_w * c.lanes);
  return 4 * (double(imin(channels, g.in_channels)) * double(shape_of(g, c).pitch) +
              kMaxGradRows * double(tile_shape(int(c.lanes), c.h, c.w).pitch));
}

double spill_of(const Candidate& c, double bytes) {
  if (bytes <= double(kTileBytes)) return 1.0;
  return c.direct && bytes <= kSharedCacheBytes ? kDirectSpillCost : kSpillCost;
}

// Vectors that hold the batch of `pixels` neighbouring output pixels.
double vectors_of(const ConvGeometry& g, const Candidate& c, int64_t pixels) {
  if (!c.direct || g.stride_w > 1)
    return double(pixels) * double(ceil_div(c.lanes, kLanes));
  return double(ceil_div(pixels * c.lanes, kLanes));
}

// Nanoseconds of all tiles.
double cost_of(const ConvGeometry& g, const Weight& w, const Candidate& c) {
  const TileShape s = shape_of(g, c);
  const int rows = pow2_floor(imin<int64_t>(w.bh, kMaxGradRows));
  const double stored = double(g.out_channels) * w.per_row;
  const double keys = double(c.bands * (c.clip_y ? g.kh : 1) * (c.clip_x ? g.kw : 1));
  const double per_key = w.per_row / keys;
  const double row_visits = double(g.out_channels * c.bands) / rows;
  const double groups = double(g.out_channels) / rows * keys *
                        imin(per_key, per_key / max_columns(rows) + 0.5);
  const double out_vectors = double(c.h) * vectors_of(g, c, c.w);
  const double in_vectors = double(c.direct ? rows_read(g, c) : s.height) *
                            double(s.width * ceil_div(c.lanes, kLanes));
  const double inside = (c.clip_y ? w.inside_y : 1.0) * (c.clip_x ? w.inside_x : 1.0);
  const double spill = spill_of(c, bytes_of(g, w, c));
  const double fma = kFmaCost * stored * inside * out_vectors *
                     (kRegisterShare + (1 - kRegisterShare) * spill / rows);
  const double start = kVisitCost * stored + kGroupCost * groups + kRowCost * row_visits;
  const double load = (c.direct ? kStreamCost : kPackCost + kPackPieceCost * 16 / double(c.lanes)) *
                      (in_vectors * double(g.in_channels) +
                       out_vectors * double(g.out_channels * c.bands));
  const double tiles = double(ceil_div(g.out_h, c.h) * ceil_div(g.out_w, c.w)) *
                       double(ceil_div(g.batch, c.lanes));
  return tiles * (fma + start + load);
}

bool has_border(const ConvGeometry& g) {
  return g.pad_top > 0 || g.pad_left > 0 || g.pad_bottom > 0 || g.pad_right > 0;
}

template <class Consider>
void each_candidate(const ConvGeometry& g, Consider consider) {
  const int64_t max_lanes = round_up(g.batch, kLanes);
  for (int64_t bands = 1; bands <= imin(kMaxBands, g.in_channels); bands *= 2) {
    for (int64_t h = g.out_h;; h = ceil_div(h, 2)) {
      consider(Candidate{has_border(g), has_border(g), true, g.batch, bands, h, g.out_w});
      if (h == 1) break;
    }
    for (int64_t lanes = imax(16, kLanes);; lanes *= 2) {
      const int64_t used = imin(lanes, max_lanes);
      for (int64_t w = g.out_w;; w = ceil_div(w, 2)) {
        for (int64_t h = g.out_h;; h = ceil_div(h, 2)) {
          consider(Candidate{false, false, false, used, bands, h, w});
          consider(Candidate{true, false, false, used, bands, h, w});
          if (w == g.out_w) consider(Candidate{true, true, false, used, bands, h, w});
          if (h == 1) break;
        }
        if (w == 1) break;
      }
      if (lanes >= max_lanes || lanes >= 128) break;
    }
  }
}

// The cheapest candidate of at most `budget` bytes, false if there is none; `least` becomes the
// bytes of the smallest that packs.
bool choose(const ConvGeometry& g, const Weight& w, double budget, Candidate& best, double& least) {
  double best_cost = 1e300;
  each_candidate(g, [&](const Candidate& c) {
    const double bytes = bytes_of(g, w, c);
    if (!c.direct) least = imin(least, bytes);
    if (bytes > budget && !c.direct) return;
    const double cost = cost_of(g, w, c);
    if (cost < best_cost) {
      best_cost = cost;
      best = c;
    }
  });
  return best_cost < 1e300;
}

// Where even the smallest tile is beyond the budget: a few times that, for the cost to choose from.
double most_bytes(double least) {
  return imin(8 * least, imax(double(kLargeTileBytes), 2 * least));
}

}  // namespace

WgradTile WgradPlan::locate(const ConvGeometry& g, int64_t index) const {
  WgradTile t;
  const int64_t group = index % lane_groups, band = index / lane_groups;
  t.n0 = group * tile.lanes;
  t.i0 = band / bands_x * band_h;
  t.rows = imin(band_h, g.out_h - t.i0);
  t.j0 = band % bands_x * band_w;
  t.cols = imin(band_w, g.out_w - t.j0);
  t.y0 = t.i0 * g.stride_h - g.pad_top;
  t.y1 = t.y0 + span(t.rows, g.stride_h, g.kh, g.dil_h);
  t.x0 = clip_x ? 0 : t.j0 * g.stride_w - g.pad_left;
  if (clip_y) {
    t.y0 = imin(imax<int64_t>(0, t.y0), g.in_h);
    t.y1 = imax(t.y0, imin(t.y1, g.in_h));
  }
  if (direct) t.y0 = 0;
  return t;
}

KeyRegion WgradPlan::region(const ConvGeometry& g, const WgradTile& t, int64_t key) const {
  int64_t i0 = t.i0, i1 = t.i0 + t.rows, j0 = t.j0, j1 = t.j0 + t.cols;
  if (clip_y) {
    const int64_t dy = key % g.kh * g.dil_h - g.pad_top;
    i0 = imax(i0, ceil_div(imax<int64_t>(0, -dy), g.stride_h));
    i1 = imin(i1, floor_div(g.in_h - 1 - dy, g.stride_h) + 1);
  }
  if (clip_x) {
    const int64_t dx = (clip_y ? key / g.kh : key) * g.dil_w - g.pad_left;
    j0 = imax(j0, ceil_div(imax<int64_t>(0, -dx), g.stride_w));
    j1 = imin(j1, floor_div(g.in_w - 1 - dx, g.stride_w) + 1);
  }
  KeyRegion k{};
  k.begin = key;
  k.end = key + 1;
  if (i0 >= i1 || j0 >= j1) return k;
  const bool one_piece = g.stride_w == 1 || j1 - j0 == 1;
  DotRegion& d = k.dots;
  d.lines = i1 - i0;
  d.steps = one_piece ? 1 : j1 - j0;
  d.run = one_piece ? (j1 - j0) * tile.lanes : tile.lanes;
  d.grad_line = t.cols * tile.lanes;
  d.x_line = g.stride_h * tile.row_pitch;
  d.x_step = g.stride_w * tile.lanes;
  d.grad_row = direct ? g.out_h * g.out_w * g.batch : grad_shape(t).pitch;
  k.grad_at = (i0 - (direct ? 0 : t.i0)) * d.grad_line + (j0 - t.j0) * tile.lanes;
  k.x_at = (i0 * g.stride_h - g.pad_top - t.y0) * tile.row_pitch +
           (j0 * g.stride_w - g.pad_left - t.x0) * tile.lanes;
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
  for (int64_t key = 0; key < keys_per_band; ++key) {
    const KeyRegion k = region(g, t, key);
    if (k.dots.lines == 0) continue;
    KeyRegion* last = count > 0 ? regions + count - 1 : nullptr;
    if (last && last->end == key && last->grad_at == k.grad_at && last->x_at == k.x_at &&
        last->dots.lines == k.dots.lines && last->dots.run == k.dots.run &&
        last->dots.steps == k.dots.steps) {
      last->end = k.end;
    } else {
      regions[count++] = k;
    }
  }
  return count;
}

WgradPlan plan_wgrad(const ConvGeometry& g, int64_t bh, int64_t bw, double per_row) {
  const Weight weight{bh, bw, per_row,
                      coverage(g.out_h, g.in_h, g.stride_h, g.pad_top, g.kh, g.dil_h),
                      coverage(g.out_w, g.in_w, g.stride_w, g.pad_left, g.kw, g.dil_w)};
  double least = 1e300;
  Candidate best{};
  if (!choose(g, weight, double(kTileBytes), best, least))
    choose(g, weight, most_bytes(least), best, least);
#ifdef WG_TUNE
  if (const char* e = getenv("WG")) {
    long cy, cx, dr, l, b, h, w;
    if (sscanf(e, "%ld,%ld,%ld,%ld,%ld,%ld,%ld", &cy, &cx, &dr, &l, &b, &h, &w) == 7)
      best = {cy != 0, cx != 0, dr != 0, l, b, h, w};
  }
  static bool once = false;
  if (!once || getenv("WGP")) {
    once = true;
    printf("[plan clip %d%d direct %d lanes %ld bands %ld h %ld w %ld KB %.0f predicted %.2f ms] ",
           best.clip_y, best.clip_x, best.direct, best.lanes, best.bands, best.h, best.w,
           bytes_of(g, weight, best) / 1024, cost_of(g, weight, best)*1e-6);
  }
#endif
  WgradPlan plan;
  plan.clip_y = best.clip_y;
  plan.clip_x = best.clip_x;
  plan.direct = best.direct;
  plan.tile = shape_of(g, best);
  plan.band_channels = ceil_div(g.in_channels, best.bands);
  plan.tile_channels = imin(plan.band_channels + bw - 1, g.in_channels);
  check_tile(double(plan.tile_channels) * double(plan.tile.pitch) +
                 double(plan.tap_offset(g, g.kh * g.kw - 1)),
             g);
  plan.bands = ceil_div(g.in_channels, plan.band_channels);
  plan.band_h = best.h;
  plan.band_w = best.w;
  plan.lane_groups = ceil_div(g.batch, best.lanes);
  plan.bands_y = ceil_div(g.out_h, best.h);
  plan.bands_x = ceil_div(g.out_w, best.w);
  plan.tiles = plan.lane_groups * plan.bands_y * plan.bands_x;
  plan.taps = g.kh * g.kw;
  plan.keys_per_band = (best.clip_y ? g.kh : 1) * (best.clip_x ? g.kw : 1);
  // A part costs one pass over partial values: few parts where little work stands behind each
  // value.
  const int64_t worth = imax<int64_t>(1, g.batch * g.out_h * g.out_w / 512);
  plan.parts = imin(imin(plan.tiles, kMaxParts), worth);
  return plan;
}

}  // namespace SK_ISA
}  // namespace sk
