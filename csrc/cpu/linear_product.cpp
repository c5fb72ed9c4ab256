// linear and linear_dgrad without lists: the pattern's lines as they are, over a dense operand that
// is packed in groups of lanes.
//
// In [feature][batch] the pieces of one group of lanes lie a power of two apart and share few cache
// sets; packed as [feature][lanes] a band of them fills a cache evenly, every load is aligned, and
// the batch's last lanes are zeros in memory.
//
// Every thread packs what it reads itself. What another core has just written is read at the speed
// of the link between two cores, which can be slower than memory, and small layers would wait for
// it longer than they compute. So threads share out groups of lanes first, lines only where there
// are more threads than groups.
#include "linear_product.h"

#include "linear_lines.h"

namespace sk {
namespace SK_ISA {
namespace {

// So many multiply-adds of a vector are worth a thread; fewer cost less than waking it.
constexpr int64_t kWorthThread = 1 << 13;

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

// All source rows' lanes of one group as [source][lanes of the group].
void pack(float* packed, const LinearProduct& p, const LaneGroups& groups, int64_t group) {
  const int64_t first = groups.first(group), size = groups.size(group);
  for (int64_t source = 0; source < p.sources; ++source, packed += size * kLanes) {
    const float* row = p.x + source * p.batch;
    for (int64_t v = 0; v < size; ++v) {
      const int64_t at = (first + v) * kLanes, rest = p.batch - at;
      vstore(packed + v * kLanes, rest >= kLanes ? vload(row + at) : vload_part(row + at, rest));
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
  c.x = packed ? packed : p.x;
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

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

// Share `share` of `shares`: groups of lanes in order, each cut in as many stretches of lines as
// give all shares the same.
void run_share(const LinearProduct& p, const LaneGroups& groups, int64_t share, int64_t shares,
               float* packed, const float* weights) {
  const int64_t splits = shares / common_divisor(groups.count, shares);
  const int64_t items = groups.count * splits;
  int64_t held = -1;
  for (int64_t item = items * share / shares; item < items * (share + 1) / shares; ++item) {
    const int64_t group = item / splits, split = item % splits;
    if (packed && group != held) pack(packed, p, groups, group);
    held = group;
    run_lines(p, groups, group, packed, weights, split_line(p.lines, split, splits),
              split_line(p.lines, split + 1, splits));
  }
}

}  // namespace

void run_linear(LinearProduct& p, ListCache* cache, int64_t kernel, int threads) {
  LaneGroups groups;
  groups.vectors = ceil_div(p.batch, kLanes);
  groups.count = ceil_div(groups.vectors, max_vectors(p.line_rows % 4 == 0 ? 4 : int(p.line_rows)));
  const int64_t widest = ceil_div(groups.vectors, groups.count) * kVecBytes;
  plan_bands(p.lines, widest, kBandBytes);
  const int64_t entries = p.lines.entries();
  const int64_t worth = entries * p.line_rows * groups.vectors / kWorthThread;
  threads = int(imax<int64_t>(1, imin<int64_t>(threads, worth)));
  const bool packs = groups.count > 1 || p.batch % kLanes != 0;
  const size_t packed_bytes = packs ? ScratchLease::padded(size_t(p.sources * widest)) : 0;
  const size_t weight_bytes = p.perm ? size_t(entries) * 4 : 0;
  ScratchLease lease(bands_scratch(p.lines) + packed_bytes * size_t(threads) +
                     ScratchLease::padded(weight_bytes));
  find_bands(p.lines, 1, cache, kernel, lease, threads);
  char* packed = packs ? static_cast<char*>(lease.take(packed_bytes * size_t(threads))) : nullptr;
  float* gathered = p.perm ? static_cast<float*>(lease.take(weight_bytes)) : nullptr;
  const float* weights = gathered ? gathered : p.values;
#pragma omp parallel num_threads(threads)
  {
    if (gathered) {
#pragma omp for schedule(static)
      for (int64_t e = 0; e < entries; ++e) gathered[e] = p.values[p.perm[e]];
    }
#pragma omp for schedule(static, 1)
    for (int64_t share = 0; share < threads; ++share) {
      run_share(p, groups, share, threads,
                packed ? reinterpret_cast<float*>(packed + packed_bytes * size_t(share)) : nullptr,
                weights);
    }
  }
}

}  // namespace SK_ISA
}  // namespace sk
