// linear and linear_dgrad without lists: the pattern's lines as they are, over a dense operand that
// is packed in groups of lanes.
//
// In [feature][batch] the pieces of one group of lanes lie a power of two apart and share few cache
// sets; packed as [group][feature][lanes] a band of them fills a cache evenly, every load is
// aligned, and the batch's last lanes are zeros in memory.
#include "linear_product.h"

#include "linear_lines.h"

namespace sk {
namespace SK_ISA {
namespace {

// Below so many multiply-adds of a vector, waking other threads costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 14;

// What one pass over the packed operand may read at random: half of a second-level cache of 512 KB.
constexpr int64_t kBandBytes = 256 * 1024;

struct LaneGroups {
  int64_t vectors, count;  // of the batch; groups
  int64_t first(int64_t group) const { return vectors * group / count; }
  int64_t size(int64_t group) const { return first(group + 1) - first(group); }
};

LinesKernel kernel_for(int rows, int64_t vectors) {
  if (rows == 4) return lines_kernel_of<4, max_vectors(4)>(vectors);
  if (rows == 2) return lines_kernel_of<2, max_vectors(2)>(vectors);
  return lines_kernel_of<1, max_vectors(1)>(vectors);
}

// Source rows [begin, end) into [group][source][lanes of the group].
void pack(float* packed, const LinearProduct& p, const LaneGroups& groups, int64_t begin,
          int64_t end) {
  for (int64_t source = begin; source < end; ++source) {
    const float* row = p.x + source * p.batch;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.first(group), size = groups.size(group);
      float* to = packed + (first * p.sources + source * size) * kLanes;
      for (int64_t v = 0; v < size; ++v) {
        const int64_t at = (first + v) * kLanes, rest = p.batch - at;
        vstore(to + v * kLanes, rest >= kLanes ? vload(row + at) : vload_part(row + at, rest));
      }
    }
  }
}

// Lines [begin, end) for one group of lanes, band by band.
void run_lines(const LinearProduct& p, const LaneGroups& groups, int64_t group, const float* packed,
               const float* weights, int64_t begin, int64_t end) {
  const int64_t first = groups.first(group), size = groups.size(group);
  const int rows = p.line_rows % 4 == 0 ? 4 : int(p.line_rows);
  const LinesKernel run = kernel_for(rows, size);
  LinesCall c{};
  c.x = packed ? packed + first * p.sources * kLanes : p.x;
  c.x_pitch = size * kLanes;
  c.step = p.lines.step;
  c.index = p.lines.index;
  c.weight_step = p.line_rows;
  c.out_pitch = p.batch;
  c.rows = p.line_rows;
  c.relu = p.relu;
  c.valid = imin(size * kLanes, p.batch - first * kLanes);
  for (int64_t band = 0; band < p.lines.bands; ++band) {
    c.lo = p.lines.lo + band;
    c.hi = p.lines.hi + band;
    c.first = band == 0;
    c.last = band + 1 == p.lines.bands;
    for (int64_t r = 0; r < p.line_rows; r += rows) {
      c.weights = weights + r;
      c.out = p.y + r * p.batch + first * kLanes;
      c.bias = p.bias ? p.bias + r : nullptr;
      run(c, begin, end);
    }
  }
}

}  // namespace

void run_linear(LinearProduct& p, ListCache* cache, int64_t kernel, int threads) {
  LaneGroups groups;
  groups.vectors = ceil_div(p.batch, kLanes);
  groups.count = ceil_div(groups.vectors, max_vectors(p.line_rows % 4 == 0 ? 4 : int(p.line_rows)));
  plan_bands(p.lines, ceil_div(groups.vectors, groups.count) * kVecBytes, kBandBytes);
  const int64_t entries = p.lines.entries();
  if (entries * p.line_rows * groups.vectors < kWorthThreads) threads = 1;
  const bool packs = groups.count > 1 || p.batch % kLanes != 0;
  const size_t packed_bytes = packs ? size_t(p.sources * groups.vectors) * kVecBytes : 0;
  const size_t weight_bytes = p.perm ? size_t(entries) * 4 : 0;
  ScratchLease lease(bands_scratch(p.lines) + ScratchLease::padded(packed_bytes) +
                     ScratchLease::padded(weight_bytes));
  find_bands(p.lines, 1, cache, kernel, lease, threads);
  float* packed = packs ? static_cast<float*>(lease.take(packed_bytes)) : nullptr;
  float* gathered = p.perm ? static_cast<float*>(lease.take(weight_bytes)) : nullptr;
  const float* weights = gathered ? gathered : p.values;
  const int64_t splits =
      threads == 1 ? 1 : imin(p.lines.count, ceil_div(4 * int64_t(threads), groups.count));
  const int64_t pieces = threads == 1 ? 1 : 4 * int64_t(threads);
#pragma omp parallel num_threads(threads)
  {
    if (packed) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < pieces; ++i)
        pack(packed, p, groups, p.sources * i / pieces, p.sources * (i + 1) / pieces);
    }
    if (gathered) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < pieces; ++i)
        for (int64_t e = entries * i / pieces; e < entries * (i + 1) / pieces; ++e)
          gathered[e] = p.values[p.perm[e]];
    }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < groups.count * splits; ++item) {
      const int64_t group = item / splits, split = item % splits;
      run_lines(p, groups, group, packed, weights, split_line(p.lines, split, splits),
                split_line(p.lines, split + 1, splits));
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
