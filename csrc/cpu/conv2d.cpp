// conv2d and conv2d_dgrad: both turn the pattern into lists for the one sparse product of
// sparse_product.h.
#include "conv2d.h"

#include "pattern_check.h"
#include "sparse_product.h"

namespace sk {
namespace SK_ISA {
namespace {

struct Blocks {
  int64_t bh, bw;
  int64_t row_blocks, col_blocks;  // per group, per tap
  int64_t seg_rows, seg_cols;      // matrix rows per group, columns per tap
};

Blocks blocks_of(const ConvGeometry& g, int64_t bh, int64_t bw) {
  const int64_t rows = g.out_channels / g.groups, cols = g.in_channels / g.groups;
  return {bh, bw, ceil_div(rows, bh), ceil_div(cols, bw), rows, cols};
}

SK_INLINE void put_entry(float* word, int64_t offset, const float* weights, int64_t stride,
                         int64_t r) {
  const int32_t o = int32_t(offset);
  std::memcpy(word, &o, sizeof(o));
  if (r == 1) {  // the commonest, without a loop
    word[1] = weights[0];
    return;
  }
  for (int64_t i = 0; i < r; ++i) word[1 + i] = weights[i * stride];
}

// Chunks over `parts` segments of `seg` output rows in blocks of `height`; calls words(part, block)
// for the entries of one.
template <class Count>
int64_t make_chunks(Chunk* chunks, int32_t* owner, int64_t parts, int64_t blocks, int64_t seg,
                    int64_t height, int max_log_r, Count entries) {
  int64_t n = 0, words = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t rows = imin(height, seg - b * height);
      const int64_t count = entries(part, b);
      for (int64_t r = 0; r < rows;) {
        const int log_r = chunk_log(rows - r, max_log_r);
        if (chunks) {
          chunks[n] = {words, int32_t(part * seg + b * height + r), log_r};
          owner[2 * n] = int32_t(part * blocks + b);
          owner[2 * n + 1] = int32_t(r);
        }
        ++n;
        words += count * (1 + (int64_t(1) << log_r));
        r += int64_t(1) << log_r;
      }
    }
  }
  // The caller sizes its lease by a first pass without chunks, and learns the number of words from
  // the return value.
  return chunks ? n : words;
}

int64_t count_chunks(int64_t parts, int64_t blocks, int64_t seg, int64_t height, int max_log_r) {
  if (blocks == 0) return 0;
  const int64_t last = seg - (blocks - 1) * height;
  return parts * ((blocks - 1) * chunks_in(height, max_log_r) + chunks_in(last, max_log_r));
}

struct ListScratch {
  int64_t chunks, words, segments;
  size_t bytes() const {
    return ScratchLease::padded(size_t(chunks) * sizeof(Chunk)) +
           ScratchLease::padded(size_t(chunks) * 8) +
           ScratchLease::padded(size_t(chunks) * size_t(segments + 1) * 4) +
           ScratchLease::padded(size_t(words) * 4);
  }
};

ProductLists take_lists(ScratchLease& lease, const ListScratch& s, int32_t*& owner) {
  ProductLists lists;
  lists.chunks = static_cast<Chunk*>(lease.take(size_t(s.chunks) * sizeof(Chunk)));
  owner = static_cast<int32_t*>(lease.take(size_t(s.chunks) * 8));
  lists.segments = static_cast<int32_t*>(lease.take(size_t(s.chunks) * size_t(s.segments + 1) * 4));
  lists.words = static_cast<float*>(lease.take(size_t(s.words) * 4));
  lists.count = s.chunks;
  return lists;
}

struct Weights {
  const float* values;
  const int32_t *crow, *col, *perm;  // forward: crow, col; dgrad: t_crow, t_row, t_perm
};

// The list of one forward chunk: the stored blocks of a block row, tap by tap, channel by channel.
void fill_forward(const ConvGeometry& g, const Blocks& b, const Product& p, const ProductPlan& plan,
                  const Weights& w, int64_t block_row, int64_t r0, int log_r, float* words,
                  int32_t* segments) {
  const int64_t r = int64_t(1) << log_r;
  const int64_t group = block_row / b.row_blocks;
  // Columns are sorted: taps are met in order, and no division per non-zero is needed (it would
  // cost more than the products of a small batch).
  int64_t tap_end = 0, next = 0, kx = -1, s = -1, base = 0;
  int32_t n = 0;
  for (int64_t e = w.crow[block_row]; e < w.crow[block_row + 1]; ++e) {
    while (w.col[e] >= next) {
      tap_end = next;
      next += b.col_blocks;
      if (++kx == g.kw || s < 0) {
        kx = 0;
        segments[++s] = n;
      }
      base = tile_offset(p, plan, group * b.seg_cols, s, kx * g.dil_w - g.pad_left);
    }
    const int64_t c0 = (w.col[e] - tap_end) * b.bw;
    const int64_t width = imin(b.bw, b.seg_cols - c0);
    const float* block = w.values + (e * b.bh + r0) * b.bw;
    for (int64_t c = 0; c < width; ++c, ++n)
      put_entry(words + n * (1 + r), base + (c0 + c) * plan.tile.pitch, block + c, b.bw, r);
  }
  while (s < p.segments) segments[++s] = n;
}

// One phase of dgrad: the taps that connect input pixels (y0 + i*stride_h, x0 + j*stride_w) to
// output pixels.
struct Phase {
  int64_t y0, x0;
  int64_t ky[2], kx[2];      // first tap and distance to the next; taps below kh, kw
  int64_t count_y, count_x;  // number of taps
};

SK_INLINE int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t t = a % b;
    a = b;
    b = t;
  }
  return a;
}

// Taps k < kernel with (at + pad - k*dil) divisible by stride: an arithmetic progression.
void phase_taps(int64_t at, int64_t pad, int64_t dil, int64_t stride, int64_t kernel, int64_t* k,
                int64_t& count) {
  k[0] = 0;
  k[1] = stride / gcd(stride, dil);
  while (k[0] < imin(kernel, k[1]) && (at + pad - k[0] * dil) % stride != 0) ++k[0];
  count = k[0] < imin(kernel, k[1]) ? (kernel - 1 - k[0]) / k[1] + 1 : 0;
}

SK_INLINE int32_t lower_bound(const int32_t* a, int32_t lo, int32_t hi, int64_t key) {
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (a[mid] < key) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// Stored blocks of one block column that belong to one group.
void column_range(const ConvGeometry& g, const Blocks& b, const Weights& w, int64_t block_col,
                  int64_t group, int32_t& lo, int32_t& hi) {
  lo = w.crow[block_col];
  hi = w.crow[block_col + 1];
  if (g.groups > 1) {
    lo = lower_bound(w.col, lo, hi, group * b.row_blocks);
    hi = lower_bound(w.col, lo, hi, (group + 1) * b.row_blocks);
  }
}

int64_t count_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Weights& w,
                    int64_t group, int64_t j) {
  int64_t n = 0;
  for (int64_t a = 0; a < f.count_y; ++a) {
    for (int64_t c = 0; c < f.count_x; ++c) {
      const int64_t tap = (f.ky[0] + a * f.ky[1]) * g.kw + f.kx[0] + c * f.kx[1];
      int32_t lo, hi;
      column_range(g, b, w, tap * b.col_blocks + j, group, lo, hi);
      n += hi - lo;
    }
  }
  return n * b.bh;
}

// The list of one dgrad chunk: block column j of every tap of the phase. Taps run backwards, so
// that dy grows.
void fill_dgrad(const ConvGeometry& g, const Blocks& b, const Phase& f, const Product& p,
                const ProductPlan& plan, const Weights& w, int64_t owner, int64_t c0, int log_r,
                float* words, int32_t* segments) {
  const int64_t r = int64_t(1) << log_r;
  const int64_t group = owner / b.col_blocks, j = owner % b.col_blocks;
  int32_t n = 0;
  segments[0] = 0;
  for (int64_t s = 0; s < f.count_y; ++s) {
    const int64_t ky = f.ky[0] + (f.count_y - 1 - s) * f.ky[1];
    for (int64_t t = f.count_x - 1; t >= 0; --t) {
      const int64_t kx = f.kx[0] + t * f.kx[1];
      const int64_t dx = (f.x0 + g.pad_left - kx * g.dil_w) / g.stride_w;
      int32_t lo, hi;
      column_range(g, b, w, (ky * g.kw + kx) * b.col_blocks + j, group, lo, hi);
      for (int32_t e = lo; e < hi; ++e) {
        const int64_t i = w.col[e] - group * b.row_blocks;
        const int64_t height = imin(b.bh, b.seg_rows - i * b.bh);
        const int64_t offset = tile_offset(p, plan, group * b.seg_rows + i * b.bh, s, dx);
        const float* block = w.values + int64_t(w.perm[e]) * b.bh * b.bw + c0;
        for (int64_t h = 0; h < height; ++h, ++n)
          put_entry(words + n * (1 + r), offset + h * plan.tile.pitch, block + h * b.bw, 1, r);
      }
    }
    segments[s + 1] = n;
  }
  for (int64_t s = f.count_y; s < p.segments; ++s) segments[s + 1] = n;
}

void run_phase(const ConvGeometry& g, const Blocks& b, const Phase& f, Product p, const Weights& w,
               int threads) {
  const ProductPlan plan = plan_product(p, g, b.bw);
  auto entries = [&](int64_t group, int64_t j) { return count_dgrad(g, b, f, w, group, j); };
  ListScratch need;
  need.chunks = count_chunks(g.groups, b.col_blocks, b.seg_cols, b.bw, plan.max_log_r);
  need.words = make_chunks(nullptr, nullptr, g.groups, b.col_blocks, b.seg_cols, b.bw,
                           plan.max_log_r, entries);
  need.segments = p.segments;
  ScratchLease lease(need.bytes() + product_scratch(p, plan, threads));
  int32_t* owner;
  const ProductLists lists = take_lists(lease, need, owner);
  make_chunks(lists.chunks, owner, g.groups, b.col_blocks, b.seg_cols, b.bw, plan.max_log_r,
              entries);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < lists.count; ++k)
    fill_dgrad(g, b, f, p, plan, w, owner[2 * k], owner[2 * k + 1], lists.chunks[k].log_r,
               lists.words + lists.chunks[k].words, lists.segments + k * (p.segments + 1));
  run_product(p, plan, lists, lease, threads);
}

}  // namespace

void conv2d(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, const ConvGeometry& g, int64_t bh, int64_t bw, int64_t capacity,
            bool relu, int threads) {
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_rows = g.groups * b.row_blocks;
  check_pattern(
      {"crow_indices", "col_indices", crow, col, nullptr, block_rows, g.kh * g.kw * b.col_blocks},
      capacity, threads);
  if (g.batch * g.out_h * g.out_w * g.out_channels <= 0) return;
  const Weights w{values, crow, col, nullptr};
  Product p{};
  p.src = {x, g.in_h, g.in_w, g.batch};
  p.src_channels = g.in_channels;
  p.rows = g.out_channels;
  p.dst = y;
  p.dst_height = p.out_h = g.out_h;
  p.dst_width = p.out_w = g.out_w;
  p.every_y = p.every_x = 1;
  p.step_y = g.stride_h;
  p.step_x = g.stride_w;
  p.segments = g.kh;
  p.dy_first = -g.pad_top;
  p.dy_step = g.dil_h;
  p.dx_first = -g.pad_left;
  p.dx_last = (g.kw - 1) * g.dil_w - g.pad_left;
  p.bias = bias;
  p.relu = relu;
  p.per_channel =
      double(crow[block_rows]) * double(bh * bw) / double(imax<int64_t>(1, g.in_channels));
  const ProductPlan plan = plan_product(p, g, bh);
  auto entries = [&](int64_t group, int64_t i) {
    const int64_t row = group * b.row_blocks + i;
    return int64_t(crow[row + 1] - crow[row]) * bw;
  };
  ListScratch need;
  need.chunks = count_chunks(g.groups, b.row_blocks, b.seg_rows, bh, plan.max_log_r);
  need.words = make_chunks(nullptr, nullptr, g.groups, b.row_blocks, b.seg_rows, bh, plan.max_log_r,
                           entries);
  need.segments = g.kh;
  ScratchLease lease(need.bytes() + product_scratch(p, plan, threads));
  int32_t* owner;
  const ProductLists lists = take_lists(lease, need, owner);
  make_chunks(lists.chunks, owner, g.groups, b.row_blocks, b.seg_rows, bh, plan.max_log_r, entries);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < lists.count; ++k)
    fill_forward(g, b, p, plan, w, owner[2 * k], owner[2 * k + 1], lists.chunks[k].log_r,
                 lists.words + lists.chunks[k].words, lists.segments + k * (g.kh + 1));
  run_product(p, plan, lists, lease, threads);
}

void conv2d_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& g, int64_t bh,
                  int64_t bw, int64_t capacity, int threads) {
  const Blocks b = blocks_of(g, bh, bw);
  const int64_t block_cols = g.kh * g.kw * b.col_blocks;
  check_pattern({"t_crow", "t_row", t_crow, t_row, t_perm, block_cols, g.groups * b.row_blocks},
                capacity, threads);
  if (g.batch * g.in_h * g.in_w * g.in_channels <= 0) return;
  const double per_channel =
      double(t_crow[block_cols]) * double(bh * bw) / double(imax<int64_t>(1, g.out_channels));
  const Weights w{values, t_crow, t_row, t_perm};
  for (int64_t y0 = 0; y0 < imin(g.stride_h, g.in_h); ++y0) {
    for (int64_t x0 = 0; x0 < imin(g.stride_w, g.in_w); ++x0) {
      Phase f;
      f.y0 = y0;
      f.x0 = x0;
      phase_taps(y0, g.pad_top, g.dil_h, g.stride_h, g.kh, f.ky, f.count_y);
      phase_taps(x0, g.pad_left, g.dil_w, g.stride_w, g.kw, f.kx, f.count_x);
      Product p{};
      p.src = {grad, g.out_h, g.out_w, g.batch};
      p.src_channels = g.out_channels;
      p.rows = g.in_channels;
      p.dst = dx;
      p.dst_height = g.in_h;
      p.dst_width = g.in_w;
      p.first_y = y0;
      p.first_x = x0;
      p.every_y = g.stride_h;
      p.every_x = g.stride_w;
      p.out_h = ceil_div(g.in_h - y0, g.stride_h);
      p.out_w = ceil_div(g.in_w - x0, g.stride_w);
      p.step_y = p.step_x = 1;
      if (f.count_y == 0 || f.count_x == 0)
        f.count_y = f.count_x = 0;  // nothing reaches this phase: zeros
      p.segments = imax<int64_t>(1, f.count_y);
      p.per_channel = per_channel * double(f.count_y * f.count_x) / double(g.kh * g.kw);
      p.dy_step = 1;
      if (f.count_y > 0) {
        // Exact divisions: phase_taps chose the taps so.
        p.dy_first =
            (y0 + g.pad_top - (f.ky[0] + (f.count_y - 1) * f.ky[1]) * g.dil_h) / g.stride_h;
        p.dy_step = f.ky[1] * g.dil_h / g.stride_h;
        p.dx_first =
            (x0 + g.pad_left - (f.kx[0] + (f.count_x - 1) * f.kx[1]) * g.dil_w) / g.stride_w;
        p.dx_last = (x0 + g.pad_left - f.kx[0] * g.dil_w) / g.stride_w;
      }
      run_phase(g, b, f, p, w, threads);
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
