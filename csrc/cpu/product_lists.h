// From a pattern to the lists of rows_kernel: cut the output rows in chunks, sort each chunk's
// non-zeros by band and vertical tap.
//
// Two passes over the pattern, one that counts and one that fills: the lists of a band lie side by
// side in the order of use, so that all rows stream through them once per pixel block. Lists depend
// on the pattern alone; the weights are gathered in their order for every product.
#pragma once

#include "list_cache.h"
#include "pattern_check.h"
#include "sparse_product.h"

namespace sk {
namespace SK_ISA {

// Output rows: `parts` segments of `seg` rows in `blocks` blocks of `height`, the last one shorter.
struct RowBlocks {
  int64_t parts, blocks, seg, height;
};

// A chunk's place in its block: block number over all parts, first row inside the block.
struct ChunkOwner {
  int32_t block, row;
};

// Where a chunk's entries go. Told of each tap, then of each stored column of it by growing
// channel, it knows the (band, segment) without a division per entry.
class ListVisitor {
 public:
  // `at`: one number per (band, segment). offsets null: count them. Else: next free place.
  ListVisitor(const Product& p, const ProductPlan& plan, uint32_t* at, int32_t* offsets,
              int32_t* sources)
      : p_(p), plan_(plan), at_(at), offsets_(offsets), sources_(sources) {}

  // Vertical tap s; horizontal distance dx; `group` of the source channels.
  void tap(int64_t s, int64_t dx, int64_t group) {
    const int64_t band_row = s / plan_.band_segs * plan_.channel_bands;
    slot_ = band_row * plan_.band_segs + s % plan_.band_segs;
    band_end_ = plan_.band_channels;
    offset_ = group * p_.seg_channels * plan_.slab.pitch + tap_offset(p_, plan_, s, dx);
  }

  // A stored column: source channel inside the group, index of its first weight.
  void entry(int64_t channel, int64_t source) {
    while (channel >= band_end_) {
      band_end_ += plan_.band_channels;
      slot_ += plan_.band_segs;
    }
    const uint32_t n = at_[slot_]++;
    if (!offsets_) return;
    offsets_[n] = int32_t(offset_ + channel * plan_.slab.pitch);
    sources_[n] = int32_t(source);
  }

 private:
  const Product& p_;
  const ProductPlan& plan_;
  uint32_t* at_;
  int32_t *offsets_, *sources_;
  int64_t slot_ = 0, band_end_ = 0, offset_ = 0;
};

// Sizes of the lists, and where they lie in one block of memory.
struct ListSizes {
  int64_t chunks, entries, slots;
  size_t chunk_bytes() const { return ScratchLease::padded(size_t(chunks) * sizeof(Chunk)); }
  size_t start_bytes() const { return ScratchLease::padded(size_t(slots + 1) * 4); }
  size_t entry_bytes() const { return ScratchLease::padded(size_t(entries) * 4); }
  size_t bytes() const { return chunk_bytes() + start_bytes() + 2 * entry_bytes(); }

  ProductLists at(void* block) const {
    char* p = static_cast<char*>(block);
    ProductLists lists;
    lists.count = chunks;
    lists.chunks = reinterpret_cast<Chunk*>(p);
    lists.starts = reinterpret_cast<uint32_t*>(p += chunk_bytes());
    lists.offsets = reinterpret_cast<int32_t*>(p += start_bytes());
    lists.sources = reinterpret_cast<int32_t*>(p + entry_bytes());
    return lists;
  }
};

// Calls visit(row, log_r, owner) for every chunk in order.
template <class Visit>
void each_chunk(const RowBlocks& r, int max_log_r, Visit visit) {
  for (int64_t part = 0; part < r.parts; ++part) {
    for (int64_t b = 0; b < r.blocks; ++b) {
      const int64_t rows = imin(r.height, r.seg - b * r.height);
      for (int64_t at = 0; at < rows;) {
        const int log_r = chunk_log(rows - at, max_log_r);
        const ChunkOwner owner{int32_t(part * r.blocks + b), int32_t(at)};
        visit(part * r.seg + b * r.height + at, log_r, owner);
        at += int64_t(1) << log_r;
      }
    }
  }
}

// `entries(block)`: stored columns of a block of rows.
template <class Entries>
ListSizes list_sizes(const ProductPlan& plan, const RowBlocks& rows, const ConvGeometry& g,
                     Entries entries) {
  ListSizes sizes{};
  each_chunk(rows, plan.max_log_r, [&](int64_t, int, ChunkOwner owner) {
    ++sizes.chunks;
    sizes.entries += entries(owner.block);
  });
  check_tile(double(sizes.entries), g);  // starts and sources are 32-bit
  sizes.slots = plan.bands() * sizes.chunks * plan.band_segs;
  return sizes;
}

// Fills `lists`. `walk(owner, visitor)` tells the visitor about a chunk's entries.
template <class Walk>
void build_lists(const Product& p, const ProductPlan& plan, const RowBlocks& rows,
                 const ListSizes& sizes, const ProductLists& lists, int threads, Walk walk) {
  const int64_t bands = plan.bands(), segs = plan.band_segs, per_chunk = bands * segs;
  ScratchLease lease(ScratchLease::padded(size_t(sizes.chunks) * sizeof(ChunkOwner)) +
                     ScratchLease::padded(size_t(sizes.chunks * per_chunk) * 4));
  auto* owners = static_cast<ChunkOwner*>(lease.take(size_t(sizes.chunks) * sizeof(ChunkOwner)));
  auto* counts = static_cast<uint32_t*>(lease.take(size_t(sizes.chunks * per_chunk) * 4));
  int64_t n = 0;
  each_chunk(rows, plan.max_log_r, [&](int64_t row, int log_r, ChunkOwner owner) {
    lists.chunks[n] = {int32_t(row), log_r};
    owners[n++] = owner;
  });
  std::memset(counts, 0, size_t(sizes.chunks * per_chunk) * 4);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < sizes.chunks; ++k) {
    ListVisitor count(p, plan, counts + k * per_chunk, nullptr, nullptr);
    walk(owners[k], count);
  }
  uint32_t sum = 0;
  for (int64_t band = 0; band < bands; ++band) {
    for (int64_t k = 0; k < sizes.chunks; ++k) {
      for (int64_t s = 0; s < segs; ++s) {
        uint32_t& count = counts[k * per_chunk + band * segs + s];
        lists.starts[(band * sizes.chunks + k) * segs + s] = sum;
        sum += count;
        count = sum - count;
      }
    }
  }
  lists.starts[sizes.slots] = sum;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < sizes.chunks; ++k) {
    ListVisitor fill(p, plan, counts + k * per_chunk, lists.offsets, lists.sources);
    walk(owners[k], fill);
  }
}

// The weights in the order of the lists: [entry][1 << max_log_r].
SK_INLINE void gather_weights(float* weights, const ProductLists& lists, const ProductPlan& plan,
                              int64_t slots, const float* values, int64_t row_step, int threads) {
  const int64_t stride = int64_t(1) << plan.max_log_r;
  if (stride == 1) {
    const int64_t n = lists.starts[slots];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) weights[i] = values[lists.sources[i]];
    return;
  }
  const int64_t lines = slots / plan.band_segs;  // (band, chunk)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t rows = int64_t(1) << lists.chunks[line % lists.count].log_r;
    const uint32_t end = lists.starts[(line + 1) * plan.band_segs];
    for (uint32_t i = lists.starts[line * plan.band_segs]; i < end; ++i) {
      const float* from = values + lists.sources[i];
      for (int64_t r = 0; r < rows; ++r) weights[i * stride + r] = from[r * row_step];
    }
  }
}

// Calls run(sizes, lists) with lists from the cache, or made for this call. `measure` returns
// Sizes; `build` gets them and fills the lists.
template <class Sizes, class Measure, class Build, class Run>
void with_lists(ListCache* cache, const ListKey& key, Measure measure, Build build, Run run) {
  const size_t header = ScratchLease::padded(sizeof(Sizes));
  const void* kept = nullptr;
  if (cache) {
    const ListLock lock(*cache);
    kept = cache->find(key);
    if (!kept && !cache->full()) {
      const Sizes sizes = measure();
      char* block = static_cast<char*>(cache->allocate(header + sizes.bytes()));
      std::memcpy(block, &sizes, sizeof(sizes));
      build(sizes, sizes.at(block + header));
      cache->publish(key, block);
      kept = block;
    }
  }
  if (kept) {
    Sizes sizes;
    std::memcpy(&sizes, kept, sizeof(sizes));
    run(sizes, sizes.at(const_cast<char*>(static_cast<const char*>(kept)) + header));
    return;
  }
  const Sizes sizes = measure();
  ScratchLease lease(sizes.bytes());
  void* const block = lease.take(sizes.bytes());
  build(sizes, sizes.at(block));
  run(sizes, sizes.at(block));
}

// The product with lists from the cache, or made for this call. `values` of a chunk's next row are
// `row_step` further on.
template <class Entries, class Walk>
void run_with_lists(const Product& p, const RowBlocks& rows, const ConvGeometry& g,
                    const float* values, int64_t row_step, ListCache* cache, const ListKey& key,
                    int threads, Entries entries, Walk walk) {
  const ProductPlan plan = plan_product(p, g, rows.height);
  with_lists<ListSizes>(
      cache, key, [&] { return list_sizes(plan, rows, g, entries); },
      [&](const ListSizes& sizes, const ProductLists& lists) {
        build_lists(p, plan, rows, sizes, lists, threads, walk);
      },
      [&](const ListSizes& sizes, const ProductLists& lists) {
        const size_t weight_bytes = (size_t(sizes.entries) << plan.max_log_r) * 4;
        ScratchLease lease(ScratchLease::padded(weight_bytes) + product_scratch(p, plan, threads));
        float* weights = static_cast<float*>(lease.take(weight_bytes));
        gather_weights(weights, lists, plan, sizes.slots, values, row_step, threads);
        run_product(p, plan, lists, weights, lease, threads);
      });
}

}  // namespace SK_ISA
}  // namespace sk
