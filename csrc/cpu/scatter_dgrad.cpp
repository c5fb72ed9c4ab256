#include "scatter_dgrad.h"

#include "scratch.h"

namespace sk {
namespace SK_ISA {
namespace {

// The rows of dx that a gradient row reaches: what the second-level cache holds beside the stream
// of gradients, and what is worth it at all.
constexpr double kNearBytes = 320 * 1024, kWindowBytes = 640 * 1024;
// Cycles per vector, of docs/kernel-log.md's machine: adding to a row of dx, near and further away,
// packing a source (for every phase, where there is a stride), a product of a packed source.
constexpr double kAddCost = 4, kFarAddCost = 6;
constexpr double kPackedCost = 12, kPhaseCost = 24, kProductCost = 1;

// A stored element: input channel, tap, weight.
struct Entry {
  int32_t channel, ky, kx;
  float weight;
};

struct Lists {
  int32_t* starts;  // [out_channels + 1]
  Entry* entries;   // by output channel, taps in order
};

// Calls visit(out channel, in channel, tap, index into values) for every stored element, tap by
// tap.
template <class Visit>
SK_INLINE void each_element(const int32_t* t_crow, const int32_t* t_row, const int32_t* t_perm,
                            const ConvGeometry& g, int64_t bh, int64_t bw, Visit visit) {
  const int64_t seg_rows = g.out_channels / g.groups, seg_cols = g.in_channels / g.groups;
  const int64_t row_blocks = ceil_div(seg_rows, bh), col_blocks = ceil_div(seg_cols, bw);
  for (int64_t column = 0; column < g.kh * g.kw * col_blocks; ++column) {
    const int64_t tap = column / col_blocks, c0 = column % col_blocks * bw;
    const int64_t width = imin(bw, seg_cols - c0);
    for (int32_t e = t_crow[column]; e < t_crow[column + 1]; ++e) {
      const int64_t group = t_row[e] / row_blocks, r0 = t_row[e] % row_blocks * bh;
      const int64_t height = imin(bh, seg_rows - r0);
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w)
          visit(group * seg_rows + r0 + h, group * seg_cols + c0 + w, tap,
                (int64_t(t_perm[e]) * bh + h) * bw + w);
      }
    }
  }
}

void build(const Lists& lists, const float* values, const int32_t* t_crow, const int32_t* t_row,
           const int32_t* t_perm, const ConvGeometry& g, int64_t bh, int64_t bw) {
  int32_t* const at = lists.starts + 1;  // [k]: count of k, then its next place, then its end
  std::memset(lists.starts, 0, size_t(g.out_channels + 1) * 4);
  each_element(t_crow, t_row, t_perm, g, bh, bw,
               [&](int64_t row, int64_t, int64_t, int64_t) { ++at[row]; });
  int32_t sum = 0;
  for (int64_t k = 0; k < g.out_channels; ++k) {
    const int32_t count = at[k];
    at[k] = sum;
    sum += count;
  }
  each_element(t_crow, t_row, t_perm, g, bh, bw,
               [&](int64_t row, int64_t channel, int64_t tap, int64_t value) {
                 lists.entries[at[row]++] = {int32_t(channel), int32_t(tap / g.kw),
                                             int32_t(tap % g.kw), values[value]};
               });
}

SK_INLINE void add_run(float* dst, const float* src, int64_t n, const float* weight) {
  const Vec w = vset1(weight);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    SK_UNROLL for (int v = 0; v < 4; ++v) {
      float* const to = dst + i + v * kLanes;
      vstore(to, vfma(w, vload(src + i + v * kLanes), vload(to)));
    }
  }
  for (; i + kLanes <= n; i += kLanes) vstore(dst + i, vfma(w, vload(src + i), vload(dst + i)));
  for (; i < n; ++i) dst[i] += *weight * src[i];
}

// Adds one gradient row of one output channel to the rows [y_begin, y_end) of dx.
void add_row(float* dx, const float* grad, const ConvGeometry& g, const Entry* entry,
             const Entry* stop, int64_t i, int64_t y_begin, int64_t y_end) {
  const int64_t n = g.batch;
  for (; entry < stop; ++entry) {
    const int64_t y = i * g.stride_h + entry->ky * g.dil_h - g.pad_top;
    if (y < y_begin || y >= y_end) continue;
    const int64_t shift = entry->kx * g.dil_w - g.pad_left;  // x = j * stride_w + shift
    const int64_t lo = shift < 0 ? ceil_div(-shift, g.stride_w) : 0;
    const int64_t hi = imin(g.out_w, floor_div(g.in_w - 1 - shift, g.stride_w) + 1);
    if (lo >= hi) continue;
    float* to = dx + ((entry->channel * g.in_h + y) * g.in_w + lo * g.stride_w + shift) * n;
    const float* from = grad + lo * n;
    if (g.stride_w == 1) {
      add_run(to, from, (hi - lo) * n, &entry->weight);
      continue;
    }
    for (int64_t j = lo; j < hi; ++j, to += g.stride_w * n, from += n)
      add_run(to, from, n, &entry->weight);
  }
}

// Rows [y_begin, y_end) of dx, all channels. Each is cleared when the first gradient reaches it.
void run_rows(float* dx, const float* grad, const Lists& lists, const ConvGeometry& g,
              int64_t y_begin, int64_t y_end) {
  const int64_t row = g.in_w * g.batch, grad_row = g.out_w * g.batch;
  const int64_t reach = (g.kh - 1) * g.dil_h;
  int64_t cleared = y_begin;
  const auto clear_to = [&](int64_t end) {
    for (; cleared < imin(end, y_end); ++cleared)
      for (int64_t c = 0; c < g.in_channels; ++c)
        zero_floats(dx + (c * g.in_h + cleared) * row, row);
  };
  const int64_t first = imax<int64_t>(0, ceil_div(y_begin + g.pad_top - reach, g.stride_h));
  const int64_t last = imin(g.out_h, floor_div(y_end - 1 + g.pad_top, g.stride_h) + 1);
  for (int64_t i = first; i < last; ++i) {
    clear_to(i * g.stride_h - g.pad_top + reach + 1);
    for (int64_t k = 0; k < g.out_channels; ++k) {
      add_row(dx, grad + (k * g.out_h + i) * grad_row, g, lists.entries + lists.starts[k],
              lists.entries + lists.starts[k + 1], i, y_begin, y_end);
    }
  }
  clear_to(y_end);
}

}  // namespace

bool scatters(const ConvGeometry& g, int64_t stored) {
  if (g.in_h * g.in_w == 1) return false;                    // one row: nothing to share out
  if (g.stride_w > 1 && g.batch < 2 * kLanes) return false;  // short pieces
  const double row = double(g.in_w) * double(g.batch) * 4;
  const double window = double(g.in_channels) * double((g.kh - 1) * g.dil_h + 1) * row;
  if (window > kWindowBytes) return false;
  const double per_source = double(stored) / double(imax<int64_t>(1, g.out_channels));
  const double phases = double(imin(g.stride_h, g.kh) * imin(g.stride_w, g.kw));
  const double packed = phases > 1 ? kPhaseCost * phases : kPackedCost;
  const double add = window > kNearBytes ? kFarAddCost : kAddCost;
  return add * per_source < packed + kProductCost * per_source;
}

void scatter_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                   const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& g, int64_t bh,
                   int64_t bw, int threads) {
  const int64_t stored = t_crow[g.kh * g.kw * ceil_div(g.in_channels / g.groups, bw)] * bh * bw;
  const size_t starts = ScratchLease::padded(size_t(g.out_channels + 1) * 4);
  const size_t entries = ScratchLease::padded(size_t(stored) * sizeof(Entry));
  ScratchLease lease(starts + entries);
  Lists lists;
  lists.starts = static_cast<int32_t*>(lease.take(starts));
  lists.entries = static_cast<Entry*>(lease.take(entries));
  build(lists, values, t_crow, t_row, t_perm, g, bh, bw);
  // Gradient rows at a border between parts are read twice: many parts only where they are thick.
  const bool thick = g.in_h / (2 * threads) >= 8 * g.kh;
  const int64_t parts = imin<int64_t>(g.in_h, threads == 1 ? 1 : (thick ? 2 : 1) * threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t part = 0; part < parts; ++part)
    run_rows(dx, grad, lists, g, g.in_h * part / parts, g.in_h * (part + 1) / parts);
}

}  // namespace SK_ISA
}  // namespace sk
