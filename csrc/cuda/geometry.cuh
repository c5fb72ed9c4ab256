// Where the operands of a product lie. All batch elements of all output pixels of a channel are its
// "points": point = pixel * batch + batch element, so that lanes run through memory in order, over
// the ends of rows and images.
//
// Both classes answer the same questions; the linear layer's answers are shorter.
#pragma once

#include "cuda/intrinsics.cuh"
#include "kernels_cuda.h"

namespace sk::cuda {

// Of one lane: where its points are in the source, for the tap in the corner of the kernel.
struct SourcePoint {
  int64_t offset;  // may be negative: padding
  int y, x;
};

// Of one stored block: what its column adds to that.
struct SourceColumn {
  int64_t offset;
  int tap;  // dy << 16 | dx, in pixels
};

class LinearSource {
 public:
  static constexpr bool kImage = false;
  explicit LinearSource(const ConvGeometry& g)
      : batch_(g.batch), rows_(static_cast<int>(g.out_channels)) {}
  __device__ SourcePoint Point(int point) const { return {point, 0, 0}; }
  __device__ SourceColumn Column(int column, int) const { return {column * batch_, 0}; }
  __device__ bool Inside(const SourcePoint&, int) const { return true; }
  __device__ int RowsPerGroup() const { return rows_; }

 private:
  int64_t batch_;
  int rows_;
};

// The sizes of a convolution that the kernels need, in 32 bits (launchers.cu checks that they fit).
class ConvSizes {
 protected:
  explicit ConvSizes(const ConvGeometry& g)
      : batch_(static_cast<int>(g.batch)),
        in_h_(static_cast<int>(g.in_h)),
        in_w_(static_cast<int>(g.in_w)),
        out_h_(static_cast<int>(g.out_h)),
        out_w_(static_cast<int>(g.out_w)),
        stride_h_(static_cast<int>(g.stride_h)),
        stride_w_(static_cast<int>(g.stride_w)),
        pad_top_(static_cast<int>(g.pad_top)),
        pad_left_(static_cast<int>(g.pad_left)),
        dil_h_(static_cast<int>(g.dil_h)),
        dil_w_(static_cast<int>(g.dil_w)),
        kw_(static_cast<int>(g.kw)),
        taps_(static_cast<int>(g.kh * g.kw)),
        channels_(static_cast<int>(g.in_channels / g.groups)),
        rows_(static_cast<int>(g.out_channels / g.groups)) {}

  int batch_, in_h_, in_w_, out_h_, out_w_, stride_h_, stride_w_, pad_top_, pad_left_, dil_h_;
  int dil_w_, kw_, taps_;
  int channels_, rows_;  // of one group
};

class ConvSource : private ConvSizes {
 public:
  static constexpr bool kImage = true;
  explicit ConvSource(const ConvGeometry& g) : ConvSizes(g) {}
  __device__ SourcePoint Point(int point) const {
    const int pixel = point / batch_;
    const int y = pixel / out_w_ * stride_h_ - pad_top_, x = pixel % out_w_ * stride_w_ - pad_left_;
    return {(static_cast<int64_t>(y) * in_w_ + x) * batch_ + point % batch_, y, x};
  }
  __device__ SourceColumn Column(int column, int group) const {
    const int tap = column / channels_, channel = group * channels_ + column % channels_;
    const int dy = tap / kw_ * dil_h_, dx = tap % kw_ * dil_w_;
    const int64_t pixel = (static_cast<int64_t>(channel) * in_h_ + dy) * in_w_ + dx;
    return {pixel * batch_, dy << 16 | dx};
  }
  __device__ bool Inside(const SourcePoint& point, int tap) const {
    const int y = point.y + (tap >> 16), x = point.x + (tap & 0xffff);
    return y >= 0 && y < in_h_ && x >= 0 && x < in_w_;
  }
  __device__ int RowsPerGroup() const { return rows_; }
};

// Rows of one block row: no block spans two groups.
struct BlockRow {
  int group, first, height;
};
__device__ __forceinline__ BlockRow FindBlockRow(int block_row, int rows_per_group, int bh) {
  const int per_group = (rows_per_group + bh - 1) / bh;
  const int group = block_row / per_group, local = block_row % per_group * bh;
  return {group, group * rows_per_group + local, min(bh, rows_per_group - local)};
}

// The reverse direction, for dgrad: where in grad an input pixel went by a tap.
class LinearTarget {
 public:
  explicit LinearTarget(const ConvGeometry& g) : cols_(static_cast<int>(g.in_channels)) {}
  __device__ int Taps() const { return 1; }
  __device__ int Channels() const { return cols_; }
  // Offset of the point within a channel of grad; false where no output pixel used it.
  __device__ bool Find(int point, int, int64_t* offset) const {
    *offset = point;
    return true;
  }

 private:
  int cols_;
};

class ConvTarget : private ConvSizes {
 public:
  explicit ConvTarget(const ConvGeometry& g) : ConvSizes(g) {}
  __device__ int Taps() const { return taps_; }
  __device__ int Channels() const { return channels_; }
  __device__ bool Find(int point, int tap, int64_t* offset) const {
    const int pixel = point / batch_;
    const int y = pixel / in_w_ + pad_top_ - tap / kw_ * dil_h_;
    const int x = pixel % in_w_ + pad_left_ - tap % kw_ * dil_w_;
    if (y < 0 || x < 0 || y % stride_h_ != 0 || x % stride_w_ != 0) return false;
    const int out_y = y / stride_h_, out_x = x / stride_w_;
    *offset = (static_cast<int64_t>(out_y) * out_w_ + out_x) * batch_ + point % batch_;
    return out_y < out_h_ && out_x < out_w_;
  }
};

}  // namespace sk::cuda
