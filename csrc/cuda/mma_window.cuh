// Where the operands of a block product lie, in batch-major or channels_last memory:
// [pixel][channel].
//
// A linear layer is a convolution of images of one pixel. Forward, the destination is y and the
// source x; transposed (the input gradient) the destination is dx and the source grad. Transposed,
// the points of one phase of the stride are done together: destination pixels that are a stride
// apart, which all meet the same taps.
#pragma once

#include <algorithm>

#include "cuda/intrinsics.cuh"
#include "kernels_mma.h"

namespace sk::cuda {

// Every length of a product in 32 bits (the launchers check that they fit).
struct Window {
  int src_h, src_w, dst_h, dst_w;
  int src_channels, dst_channels, src_group, dst_group;  // all, and of one group
  int src_blocks, dst_blocks;                            // of one group
  int lattice_h, lattice_w;                              // points of one image and phase
  int taps, kw, stride_h, stride_w, pad_top, pad_left, dil_h, dil_w;
  int groups;
};

inline Window MakeWindow(const ConvGeometry& g, int64_t block, bool transposed) {
  const auto blocks = [block](int64_t channels) {
    return static_cast<int>((channels + block - 1) / block);
  };
  Window w = {};
  w.src_h = static_cast<int>(transposed ? g.out_h : g.in_h);
  w.src_w = static_cast<int>(transposed ? g.out_w : g.in_w);
  w.dst_h = static_cast<int>(transposed ? g.in_h : g.out_h);
  w.dst_w = static_cast<int>(transposed ? g.in_w : g.out_w);
  w.src_channels = static_cast<int>(transposed ? g.out_channels : g.in_channels);
  w.dst_channels = static_cast<int>(transposed ? g.in_channels : g.out_channels);
  w.src_group = w.src_channels / static_cast<int>(g.groups);
  w.dst_group = w.dst_channels / static_cast<int>(g.groups);
  w.src_blocks = std::max(1, blocks(w.src_group));  // a divisor
  w.dst_blocks = blocks(w.dst_group);
  w.stride_h = static_cast<int>(g.stride_h);
  w.stride_w = static_cast<int>(g.stride_w);
  w.lattice_h = transposed ? (w.dst_h + w.stride_h - 1) / w.stride_h : w.dst_h;
  w.lattice_w = transposed ? (w.dst_w + w.stride_w - 1) / w.stride_w : w.dst_w;
  w.taps = static_cast<int>(g.kh * g.kw);
  w.kw = static_cast<int>(g.kw);
  w.pad_top = static_cast<int>(g.pad_top);
  w.pad_left = static_cast<int>(g.pad_left);
  w.dil_h = static_cast<int>(g.dil_h);
  w.dil_w = static_cast<int>(g.dil_w);
  w.groups = static_cast<int>(g.groups);
  return w;
}

// A point in the source, before a tap's shift: the image's first pixel, row and column.
struct SourceRow {
  int image, y, x;
};
// What a tap adds to row and column.
struct Shift {
  int y, x;
};
constexpr int kOutside = -(1 << 30);  // a row that no shift brings into an image

// One phase of a window; there is a single one unless transposed.
template <bool kTransposed>
class Lattice {
 public:
  __device__ Lattice(const Window& w, int phase)
      : w_(w), phase_h_(phase / w.stride_w), phase_w_(phase % w.stride_w) {}

  __device__ SourceRow Source(int point, int points) const {
    if (point >= points || Pixel(point) < 0) return {0, kOutside, kOutside};
    const int j = point % w_.lattice_w, rest = point / w_.lattice_w;
    const int i = rest % w_.lattice_h, image = rest / w_.lattice_h * (w_.src_h * w_.src_w);
    if constexpr (kTransposed) return {image, i, j};
    return {image, i * w_.stride_h - w_.pad_top, j * w_.stride_w - w_.pad_left};
  }

  // Pixel of the destination, -1 where the lattice sticks out of the image.
  __device__ int Pixel(int point) const {
    if constexpr (!kTransposed) return point;
    const int j = point % w_.lattice_w, rest = point / w_.lattice_w;
    const int y = rest % w_.lattice_h * w_.stride_h + phase_h_, x = j * w_.stride_w + phase_w_;
    if (y >= w_.dst_h || x >= w_.dst_w) return -1;
    return (rest / w_.lattice_h * w_.dst_h + y) * w_.dst_w + x;
  }

  // Whether the points of the phase meet a tap at all.
  __device__ bool Meets(int tap) const {
    if constexpr (!kTransposed) return true;
    return Rest(tap).y % w_.stride_h == 0 && Rest(tap).x % w_.stride_w == 0;
  }

  __device__ Shift Of(int tap) const {
    if constexpr (!kTransposed) return {tap / w_.kw * w_.dil_h, tap % w_.kw * w_.dil_w};
    return {Rest(tap).y / w_.stride_h, Rest(tap).x / w_.stride_w};  // without remainder
  }

 private:
  __device__ Shift Rest(int tap) const {
    return {phase_h_ + w_.pad_top - tap / w_.kw * w_.dil_h,
            phase_w_ + w_.pad_left - tap % w_.kw * w_.dil_w};
  }
  const Window& w_;
  int phase_h_, phase_w_;
};

// Pixel of the source that a point reads by a tap, -1 outside of the image.
__device__ __forceinline__ int SourcePixel(const Window& w, const SourceRow& row, Shift shift) {
  const int y = row.y + shift.y, x = row.x + shift.x;
  const bool inside = y >= 0 && y < w.src_h && x >= 0 && x < w.src_w;
  return inside ? row.image + y * w.src_w + x : -1;
}

}  // namespace sk::cuda
