// From a pattern of V x 1 blocks to the lists of scatter_kernel: cut the source blocks in groups of
// 1, 2 or 4 channels, sort the stored blocks by (band of output rows, vertical tap, group, tap).
#pragma once

#include "product_lists.h"

namespace sk {
namespace SK_ISA {

// Source channels: `parts` segments of `seg` channels in `blocks` blocks of `height`, the last one
// shorter. `taps_x` horizontal taps, `dx_step` apart.
struct SourceBlocks {
  int64_t parts, blocks, seg, height;
  int64_t taps_x, dx_step;
};

// Some channels of a source block that a kernel takes at once.
struct Piece {
  int32_t channel, row;  // first channel of all, first row inside the block
  int32_t log_g;
};

// Calls visit(block, piece) for every piece in order; a block's pieces are neighbours.
template <class Visit>
void each_piece(const SourceBlocks& s, Visit visit) {
  const RowBlocks blocks{s.parts, s.blocks, s.seg, s.height};
  each_chunk(blocks, kGroupLogs - 1, [&](int64_t channel, int log_g, ChunkOwner owner) {
    visit(owner.block, Piece{int32_t(channel), owner.row, log_g});
  });
}

// Sizes of the lists, and where they lie in one block of memory.
struct ScatterSizes {
  int64_t band_rows, bands, segments, pieces, runs, entries;
  size_t slot_bytes() const {
    return ScratchLease::padded(size_t(bands * segments * kGroupLogs + 1) * 4);
  }
  size_t run_bytes() const { return ScratchLease::padded(size_t(runs) * sizeof(SourceRun)); }
  size_t entry_bytes() const { return ScratchLease::padded(size_t(entries) * 4); }
  size_t bytes() const { return 2 * slot_bytes() + run_bytes() + 2 * entry_bytes(); }

  ScatterLists at(void* block) const {
    char* p = static_cast<char*>(block);
    ScatterLists lists{band_rows, bands, segments, nullptr, nullptr, nullptr, nullptr, nullptr};
    lists.runs_at = reinterpret_cast<uint32_t*>(p);
    lists.entries_at = reinterpret_cast<uint32_t*>(p += slot_bytes());
    lists.runs = reinterpret_cast<SourceRun*>(p += slot_bytes());
    lists.rows = reinterpret_cast<int32_t*>(p += run_bytes());
    lists.sources = reinterpret_cast<int32_t*>(p + entry_bytes());
    return lists;
  }
};

// `walk(row, visit)` calls visit(segment, horizontal tap, source block, index of the block in the
// values) for each stored block of an output row.
template <class Walk>
ScatterSizes scatter_sizes(const Product& p, const ProductPlan& plan, const SourceBlocks& s,
                           const ConvGeometry& g, Walk walk) {
  ScatterSizes sizes{plan.scatter_rows, ceil_div(p.rows, plan.scatter_rows), p.segments, 0, 0, 0};
  ScratchLease lease(ScratchLease::padded(size_t(s.parts * s.blocks) * 4));
  auto* pieces_of = static_cast<int32_t*>(lease.take(size_t(s.parts * s.blocks) * 4));
  std::memset(pieces_of, 0, size_t(s.parts * s.blocks) * 4);
  each_piece(s, [&](int64_t block, Piece) {
    ++sizes.pieces;
    ++pieces_of[block];
  });
  for (int64_t row = 0; row < p.rows; ++row)
    walk(row, [&](int64_t, int64_t, int64_t block, int64_t) { sizes.entries += pieces_of[block]; });
  check_tile(double(sizes.entries), g);  // starts and sources are 32-bit
  const int64_t most = sizes.bands * p.segments * s.taps_x * sizes.pieces;
  sizes.runs = imin(most, sizes.entries);
  return sizes;
}

// Counts the entries of each possible run, places the runs, fills them.
class ScatterSlots {
 public:
  // Scratch: pieces, where each block's begin, and a number per possible run.
  static size_t bytes(const SourceBlocks& s, const ScatterSizes& sizes) {
    const int64_t runs = sizes.bands * sizes.segments * s.taps_x * sizes.pieces;
    return ScratchLease::padded(size_t(sizes.pieces) * sizeof(Piece)) +
           ScratchLease::padded(size_t(s.parts * s.blocks + 1) * 4) +
           ScratchLease::padded(size_t(runs) * 4);
  }

  ScatterSlots(const Product& p, const ProductPlan& plan, const SourceBlocks& s,
               const ScatterSizes& sizes, const ScatterLists& lists, ScratchLease& lease)
      : p_(p), plan_(plan), s_(s), sizes_(sizes), lists_(lists) {
    const int64_t blocks = s.parts * s.blocks;
    const size_t runs = size_t(sizes.bands * sizes.segments * s.taps_x * sizes.pieces);
    pieces_ = static_cast<Piece*>(lease.take(size_t(sizes.pieces) * sizeof(Piece)));
    first_ = static_cast<int32_t*>(lease.take(size_t(blocks + 1) * 4));
    at_ = static_cast<uint32_t*>(lease.take(runs * 4));
    std::memset(at_, 0, runs * 4);
    int32_t n = 0;
    int64_t filled = 0;
    each_piece(s, [&](int64_t block, Piece piece) {
      while (filled <= block) first_[filled++] = n;
      pieces_[n++] = piece;
    });
    while (filled <= blocks) first_[filled++] = n;
  }

  template <class Walk>
  void count(int64_t band, Walk walk) {
    each(band, walk, [&](uint32_t& at, int64_t, int64_t, const Piece&) { ++at; });
  }

  // The runs that are not empty, in the order of the slab (by length, so that loop ends would be
  // foreseen, it is read back and forth: slower), and where their entries begin.
  void place() {
    uint32_t run = 0, entry = 0;
    for (int64_t line = 0; line < sizes_.bands * sizes_.segments; ++line) {
      for (int log_g = 0; log_g < kGroupLogs; ++log_g) {
        const int64_t slot = line * kGroupLogs + log_g;
        lists_.runs_at[slot] = run;
        lists_.entries_at[slot] = entry;
        for (int64_t tap = 0; tap < s_.taps_x; ++tap) place_tap(line, log_g, tap, run, entry);
      }
    }
    lists_.runs_at[lists_.slots()] = run;
    lists_.entries_at[lists_.slots()] = entry;
  }

  template <class Walk>
  void fill(int64_t band, Walk walk) {
    const int64_t vectors = int64_t(1) << plan_.scatter_log;
    each(band, walk, [&](uint32_t& at, int64_t row, int64_t block_at, const Piece& piece) {
      lists_.rows[at] = int32_t((row - band * sizes_.band_rows) * vectors * kLanes);
      lists_.sources[at] = int32_t(block_at * s_.height + piece.row);
      ++at;
    });
  }

 private:
  // Calls visit(number of the run, row, block's index, piece).
  template <class Walk, class Visit>
  void each(int64_t band, Walk walk, Visit visit) {
    const int64_t end = imin(p_.rows, (band + 1) * sizes_.band_rows);
    for (int64_t row = band * sizes_.band_rows; row < end; ++row) {
      walk(row, [&](int64_t segment, int64_t tap, int64_t block, int64_t block_at) {
        const int64_t line = (band * sizes_.segments + segment) * s_.taps_x + tap;
        for (int64_t k = first_[block]; k < first_[block + 1]; ++k)
          visit(at_[line * sizes_.pieces + k], row, block_at, pieces_[k]);
      });
    }
  }

  void place_tap(int64_t line, int log_g, int64_t tap, uint32_t& run, uint32_t& entry) {
    const int64_t shift =
        tap_offset(p_, plan_, line % sizes_.segments, p_.dx_first + tap * s_.dx_step);
    for (int64_t k = 0; k < sizes_.pieces; ++k) {
      uint32_t& at = at_[(line * s_.taps_x + tap) * sizes_.pieces + k];
      if (pieces_[k].log_g != log_g || at == 0) continue;
      lists_.runs[run++] = {int32_t(pieces_[k].channel * plan_.slab.pitch + shift), int32_t(at)};
      const uint32_t count = at;
      at = entry;
      entry += count;
    }
  }

  const Product& p_;
  const ProductPlan& plan_;
  const SourceBlocks& s_;
  const ScatterSizes& sizes_;
  const ScatterLists& lists_;
  Piece* pieces_;
  int32_t* first_;
  uint32_t* at_;
};

// Fills `lists`.
template <class Walk>
void build_scatter(const Product& p, const ProductPlan& plan, const SourceBlocks& s,
                   const ScatterSizes& sizes, const ScatterLists& lists, int threads, Walk walk) {
  ScratchLease lease(ScatterSlots::bytes(s, sizes));
  ScatterSlots slots(p, plan, s, sizes, lists, lease);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t band = 0; band < sizes.bands; ++band) slots.count(band, walk);
  slots.place();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t band = 0; band < sizes.bands; ++band) slots.fill(band, walk);
}

// The weights in the order of the lists: [entry][stride].
SK_INLINE void gather_scatter_weights(float* weights, const ScatterLists& lists, int64_t stride,
                                      const float* values, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t slot = 0; slot < lists.slots(); ++slot) {
    const int64_t group = int64_t(1) << slot % kGroupLogs;
    const int64_t begin = lists.entries_at[slot], end = lists.entries_at[slot + 1];
#pragma omp for schedule(static) nowait
    for (int64_t i = begin; i < end; ++i) {
      const float* from = values + lists.sources[i];
      for (int64_t r = 0; r < group; ++r) weights[i * stride + r] = from[r];
    }
  }
}

// The product with lists from the cache, or made for this call.
template <class Walk>
void scatter_with_lists(const Product& p, const ProductPlan& plan, const SourceBlocks& s,
                        const ConvGeometry& g, const float* values, ListCache* cache,
                        const ListKey& key, int threads, Walk walk) {
  with_lists<ScatterSizes>(
      cache, key, [&] { return scatter_sizes(p, plan, s, g, walk); },
      [&](const ScatterSizes& sizes, const ScatterLists& lists) {
        build_scatter(p, plan, s, sizes, lists, threads, walk);
      },
      [&](const ScatterSizes& sizes, const ScatterLists& lists) {
        const int64_t stride = imin<int64_t>(kMaxGroup, pow2_floor(s.height));
        const size_t weight_bytes = size_t(sizes.entries * stride) * 4;
        ScratchLease lease(ScratchLease::padded(weight_bytes) + product_scratch(p, plan, threads));
        float* weights = static_cast<float*>(lease.take(weight_bytes));
        gather_scatter_weights(weights, lists, stride, values, threads);
        run_scatter(p, plan, lists, weights, stride, lease, threads);
      });
}

}  // namespace SK_ISA
}  // namespace sk
