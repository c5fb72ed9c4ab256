// linear_wgrad for blocks of one column: dot products over the batch, where the rows lie.
//
// Every stored element is one dot product of a gradient row and a source row, each without gaps in
// memory: nothing is packed, nothing is added up between calls.
#include "linear_wgrad.h"

#include "linear_dots.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kWorthThreads = 1 << 13;

// What one pass over x may read at random. Bands of half the second-level cache are slower: they
// tear the lines into pieces.
constexpr int64_t kBandBytes = 1024 * 1024;

void run_lines(const LinearWgrad& w, int64_t begin, int64_t end) {
  const Lines& lines = w.lines;
  const int64_t height = w.line_rows, batch = w.batch;
  for (int64_t band = 0; band < lines.bands; ++band) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t at = lines.lo[line * lines.step + band];
      const int64_t count = lines.hi[line * lines.step + band] - at;
      const float* grad = w.grad + line * height * batch;
      float* to = w.dvalues + at * height;
      const int32_t* index = lines.index + at;
      if (height == 1) {
        dots_kernel<1>(grad, w.x, index, count, batch, to, 1);
      } else if (height == 2) {
        dots_kernel<2>(grad, w.x, index, count, batch, to, 2);
      } else {
        for (int64_t r = 0; r < height; r += 4)
          dots_kernel<4>(grad + r * batch, w.x, index, count, batch, to + r, height);
      }
    }
  }
}

}  // namespace

void run_linear_wgrad(LinearWgrad& w, ListCache* cache, int64_t kernel, int threads) {
  plan_bands(w.lines, w.batch * 4, kBandBytes);
  const int64_t vectors = ceil_div(w.batch, kLanes);
  if (w.lines.entries() * w.line_rows * vectors < kWorthThreads) threads = 1;
  ScratchLease lease(bands_scratch(w.lines));
  const int64_t multiple = imax<int64_t>(1, kDots / w.line_rows);
  find_bands(w.lines, multiple, cache, kernel, lease, threads);
  const int64_t splits = threads == 1 ? 1 : imin(w.lines.count, 4 * int64_t(threads));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t split = 0; split < splits; ++split)
    run_lines(w, split_line(w.lines, split, splits), split_line(w.lines, split + 1, splits));
}

}  // namespace SK_ISA
}  // namespace sk
