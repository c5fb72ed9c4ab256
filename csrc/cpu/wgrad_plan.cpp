#include "wgrad_plan.h"

#include "pattern_check.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kTileBytes = 288 * 1024;  // half of a 512 KB second-level cache and a little more
constexpr int64_t kLargeTileBytes = 32 << 20;
constexpr int64_t kMaxParts = 8;
constexpr int64_t kMaxBands = 32;  // bounds the key table: rows x bands

// Relative costs per output pixel and vector of the batch, in fused multiply-adds. Estimated,
// not fitted.
constexpr double kPackCost = 2.0;    // packing one vector
constexpr double kVisitCost = 6.0;   // starting and summing up one stored element in one tile
constexpr double kGroupCost = 12.0;  // starting one group of elements in one tile
constexpr double kSpillCost =
    2.5;  // a tile beyond the budget: its loads miss the second-level cache

struct Candidate {
  bool clipped;
  int lanes;
  int64_t bands, h, w;
};

int64_t span(int64_t outputs, int64_t stride, int64_t kernel, int64_t dil) {
  return (outputs - 1) * stride + (kernel - 1) * dil + 1;
}

TileShape shape_of(const ConvGeometry& g, const Candidate& c) {
  const int64_t h = span(c.h, g.stride_h, g.kh, g.dil_h), w = span(c.w, g.stride_w, g.kw, g.dil_w);
  if (c.clipped) return tile_shape(c.lanes, imin(h, g.in_h), g.in_w);
  return tile_shape(c.lanes, h, w);
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

// The packed input and up to four packed gradient rows. A double: shapes that no memory holds are
// planned, too, before they are refused.
double bytes_of(const ConvGeometry& g, const Candidate& c) {
  const double channels = double(ceil_div(g.in_channels, c.bands));
  return 4 * (channels * double(shape_of(g, c).pitch) +
              4 * double(tile_shape(c.lanes, c.h, c.w).pitch));
}

double cost_of(const ConvGeometry& g, const Candidate& c, double per_row, double inside) {
  const TileShape s = shape_of(g, c);
  const double pixels = double(c.h * c.w), vecs = double(c.lanes) / kLanes;
  const double spill = bytes_of(g, c) > double(kTileBytes) ? kSpillCost : 1.0;
  const double per_key = per_row / double(c.bands * (c.clipped ? g.kh * g.kw : 1));
  const double groups = double(g.out_channels) * per_row / imin(8.0, imax(per_key, 1.0));
  const double fma = double(g.out_channels) * per_row * spill * (c.clipped ? inside : 1.0);
  const double start =
      (kVisitCost * double(g.out_channels) * per_row + kGroupCost * groups) / (pixels * vecs);
  const double pack = kPackCost * double(s.height * s.width) / pixels * double(g.in_channels);
  return fma + start + pack + kPackCost * double(g.out_channels * c.bands);
}

// The cheapest candidate of at most `budget` bytes, false if there is none; `least` becomes the
// bytes of the smallest.
bool choose(const ConvGeometry& g, double per_row, double inside, double budget, Candidate& best,
            double& least) {
  double best_cost = 1e300;
  auto consider = [&](const Candidate& c) {
    const double bytes = bytes_of(g, c);
    least = imin(least, bytes);
    if (bytes > budget) return;
    const double cost = cost_of(g, c, per_row, inside);
    if (cost < best_cost) {
      best_cost = cost;
      best = c;
    }
  };
  const int64_t max_lanes = round_up(g.batch, kLanes);
  for (int lanes = kLanes < 16 ? 16 : kLanes;; lanes *= 2) {
    const int used = int(imin<int64_t>(lanes, max_lanes));
    for (int64_t bands = 1; bands <= imin(kMaxBands, g.in_channels); bands *= 2) {
      for (int64_t w = g.out_w;; w = ceil_div(w, 2)) {
        for (int64_t h = g.out_h;; h = ceil_div(h, 2)) {
          consider({false, used, bands, h, w});
          if (w == g.out_w) consider({true, used, bands, h, w});
          if (h == 1) break;
        }
        if (w == 1) break;
      }
    }
    if (lanes >= max_lanes || lanes >= 128) break;
  }
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
  t.x0 = t.j0 * g.stride_w - g.pad_left;
  if (clipped) {
    t.y0 = imin(imax<int64_t>(0, t.y0), g.in_h);
    t.y1 = imax(t.y0, imin(t.y1, g.in_h));
    t.x0 = 0;
  }
  return t;
}

bool WgradPlan::region(const ConvGeometry& g, const WgradTile& t, int64_t tap, DotRegion& d,
                       int64_t& grad_at, int64_t& x_at) const {
  d.lanes = tile.lanes;
  d.grad_line = t.cols * tile.lanes;
  d.x_line = g.stride_h * tile.row_pitch;
  d.x_step = g.stride_w * tile.lanes;
  d.lines = t.rows;
  d.pixels = t.cols;
  grad_at = x_at = 0;
  if (!clipped) return true;
  const int64_t dy = tap / g.kw * g.dil_h - g.pad_top, dx = tap % g.kw * g.dil_w - g.pad_left;
  const int64_t i0 = imax(t.i0, ceil_div(imax<int64_t>(0, -dy), g.stride_h));
  const int64_t i1 = imin(t.i0 + t.rows, floor_div(g.in_h - 1 - dy, g.stride_h) + 1);
  const int64_t j0 = imax(t.j0, ceil_div(imax<int64_t>(0, -dx), g.stride_w));
  const int64_t j1 = imin(t.j0 + t.cols, floor_div(g.in_w - 1 - dx, g.stride_w) + 1);
  if (i0 >= i1 || j0 >= j1) return false;
  d.lines = i1 - i0;
  d.pixels = j1 - j0;
  grad_at = (i0 - t.i0) * d.grad_line + (j0 - t.j0) * tile.lanes;
  x_at = (i0 * g.stride_h + dy - t.y0) * tile.row_pitch + (j0 * g.stride_w + dx) * tile.lanes;
  return true;
}

WgradPlan plan_wgrad(const ConvGeometry& g, double per_row) {
  const double inside = coverage(g.out_h, g.in_h, g.stride_h, g.pad_top, g.kh, g.dil_h) *
                        coverage(g.out_w, g.in_w, g.stride_w, g.pad_left, g.kw, g.dil_w);
  double least = 1e300;
  Candidate best{};
  if (!choose(g, per_row, inside, double(kTileBytes), best, least))
    choose(g, per_row, inside, most_bytes(least), best, least);
  WgradPlan plan;
  plan.clipped = best.clipped;
  plan.tile = shape_of(g, best);
  plan.band_channels = ceil_div(g.in_channels, best.bands);
  check_tile(double(plan.band_channels) * double(plan.tile.pitch), g);
  plan.bands = ceil_div(g.in_channels, plan.band_channels);
  plan.band_h = best.h;
  plan.band_w = best.w;
  plan.lane_groups = ceil_div(g.batch, best.lanes);
  plan.bands_y = ceil_div(g.out_h, best.h);
  plan.bands_x = ceil_div(g.out_w, best.w);
  plan.tiles = plan.lane_groups * plan.bands_y * plan.bands_x;
  plan.keys_per_band = best.clipped ? g.kh * g.kw : 1;
  plan.keys = plan.keys_per_band * plan.bands;
  // A part costs one pass over partial values: few parts where little work stands behind each
  // value.
  const int64_t worth = imax<int64_t>(1, g.batch * g.out_h * g.out_w / 512);
  plan.parts = imin(imin(plan.tiles, kMaxParts), worth);
  return plan;
}

}  // namespace SK_ISA
}  // namespace sk
