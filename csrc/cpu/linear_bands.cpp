#include "linear_bands.h"

#include "list_cache.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kLeastEntries = 16;

ListKey key_of(const Lines& lines, int64_t kernel, int64_t multiple) {
  ListKey key;
  key.fields[0] = -1;  // no convolution has this batch
  key.fields[1] = kernel;
  key.fields[2] = lines.count;
  key.fields[3] = lines.bands;
  key.fields[4] = lines.width;
  key.fields[5] = multiple;
  return key;
}

int64_t table_size(const Lines& lines) { return lines.count * (lines.bands + 1); }

void fill_table(int32_t* table, const Lines& lines, int64_t multiple, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < lines.count; ++line) {
    int32_t* bounds = table + line * (lines.bands + 1);
    const int64_t begin = lines.starts[line], end = lines.starts[line + 1];
    int64_t at = begin;
    for (int64_t band = 0; band < lines.bands; ++band) {
      bounds[band] = int32_t(at);
      const int64_t next = lower_bound(lines.index, at, end, (band + 1) * lines.width);
      at = imin(end, begin + round_up(next - begin, multiple));
    }
    bounds[lines.bands] = int32_t(end);
  }
}

void set_table(Lines& lines, const int32_t* table) {
  lines.lo = table;
  lines.hi = table + 1;
  lines.step = lines.bands + 1;
}

}  // namespace

void plan_bands(Lines& lines, int64_t index_bytes, int64_t band_bytes) {
  band_bytes = lines.band_log < 0 ? band_bytes >> -lines.band_log : band_bytes << lines.band_log;
  const int64_t most = lines.entries() / imax<int64_t>(1, lines.count) / kLeastEntries;
  lines.bands = imax<int64_t>(1, imin(most, ceil_div(lines.bound * index_bytes, band_bytes)));
  lines.width = ceil_div(lines.bound, lines.bands);
}

size_t bands_scratch(const Lines& lines) {
  return lines.bands == 1 ? 0 : ScratchLease::padded(size_t(table_size(lines)) * 4);
}

void find_bands(Lines& lines, int64_t multiple, ListCache* cache, int64_t kernel,
                ScratchLease& lease, int threads) {
  if (lines.bands == 1) {
    lines.lo = lines.starts;
    lines.hi = lines.starts + 1;
    lines.step = 1;
    return;
  }
  const size_t bytes = size_t(table_size(lines)) * 4;
  if (cache) {
    const ListLock lock(*cache);
    const ListKey key = key_of(lines, kernel, multiple);
    const void* kept = cache->find(key);
    if (!kept && !cache->full()) {
      void* block = cache->allocate(bytes);
      fill_table(static_cast<int32_t*>(block), lines, multiple, threads);
      cache->publish(key, block);
      kept = block;
    }
    if (kept) return set_table(lines, static_cast<const int32_t*>(kept));
  }
  auto* table = static_cast<int32_t*>(lease.take(bytes));
  fill_table(table, lines, multiple, threads);
  set_table(lines, table);
}

void check_lines(const Lines& lines, const PatternArrays& arrays, int64_t capacity,
                 ListCache* cache, int64_t kernel, int threads) {
  ListKey key;
  key.fields[0] = -2;  // no convolution, no table: only says that the arrays are sound
  key.fields[1] = kernel;
  key.fields[2] = lines.count;
  key.fields[3] = lines.bound;
  key.fields[4] = capacity;
  if (cache) {
    const ListLock lock(*cache);
    if (cache->find(key)) return;
  }
  check_pattern(arrays, capacity, threads);
  if (!cache) return;
  const ListLock lock(*cache);
  if (!cache->find(key) && !cache->full()) cache->publish(key, cache->allocate(0));
}

int64_t split_line(const Lines& lines, int64_t split, int64_t splits) {
  if (split == splits) return lines.count;
  return lower_bound(lines.starts, 0, lines.count, lines.entries() * split / splits);
}

}  // namespace SK_ISA
}  // namespace sk
