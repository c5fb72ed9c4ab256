// The stored blocks that one tile of a block product adds up, one after the other.
#pragma once

#include "cuda/dgrad.cuh"
#include "cuda/mma_window.cuh"

namespace sk::cuda {

// A stored block: what the index says, read early, and what follows from it, worked out when used.
struct Entry {
  int source;  // forward: the block's column; transposed: its row
  int value;   // place in values
  int tap;     // transposed only
};

// Forward: one block row, in the pattern's own order.
class RowWalk {
 public:
  static constexpr bool kTransposed = false;
  struct Index {
    const int32_t* crow;
    const int32_t* col;
  };
  __device__ RowWalk(const Index& index, const Window& w, const Lattice<false>&, int group,
                     int block)
      : index_(index), w_(w) {
    const int row = group * w.dst_blocks + block;
    next_ = __ldg(index.crow + row);
    end_ = __ldg(index.crow + row + 1);
  }
  __device__ bool Next(Entry& entry) {
    if (next_ >= end_) return false;
    entry = {__ldg(index_.col + next_), next_, 0};
    ++next_;
    return true;
  }
  __device__ int Tap(const Entry& entry) const { return entry.source / w_.src_blocks; }
  __device__ int Block(const Entry& entry) const { return entry.source % w_.src_blocks; }

 private:
  const Index& index_;
  const Window& w_;
  int next_, end_;
};

// Input gradient: the columns of one block of channels, tap after tap, of those that the phase
// meets.
class ColumnWalk {
 public:
  static constexpr bool kTransposed = true;
  struct Index {
    const int32_t* t_crow;
    const int32_t* t_row;
    const int32_t* t_perm;
  };
  __device__ ColumnWalk(const Index& index, const Window& w, const Lattice<true>& lattice,
                        int group, int block)
      : index_(index), w_(w), lattice_(lattice), group_(group), block_(block) {}
  __device__ bool Next(Entry& entry) {
    while (next_ >= end_) {
      if (++tap_ >= w_.taps) return false;
      if (!lattice_.Meets(tap_)) continue;
      const int column = tap_ * w_.dst_blocks + block_;
      next_ = __ldg(index_.t_crow + column);
      end_ = __ldg(index_.t_crow + column + 1);
      if (w_.groups == 1) continue;  // else the column is one of every group
      next_ = LowerBound(index_.t_row, next_, end_, group_ * w_.src_blocks);
      end_ = LowerBound(index_.t_row, next_, end_, (group_ + 1) * w_.src_blocks);
    }
    entry = {__ldg(index_.t_row + next_), __ldg(index_.t_perm + next_), tap_};
    ++next_;
    return true;
  }
  __device__ int Tap(const Entry& entry) const { return entry.tap; }
  __device__ int Block(const Entry& entry) const { return entry.source - group_ * w_.src_blocks; }

 private:
  const Index& index_;
  const Window& w_;
  const Lattice<true>& lattice_;
  int group_, block_, tap_ = -1, next_ = 0, end_ = 0;
};

}  // namespace sk::cuda
