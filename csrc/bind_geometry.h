// Checks of the sparse products' arguments: the weight, and the geometry of a convolution.
#pragma once

#include <algorithm>
#include <vector>

#include "bind_checks.h"
#include "kernels.h"

namespace sk {

inline void RequireWeight(const char* kernel, Address crow, Address col, int64_t bh, int64_t bw,
                          int64_t capacity) {
  RequireSize(kernel, "bh", bh, 1);
  RequireSize(kernel, "bw", bw, 1);
  RequireSize(kernel, "capacity", capacity);
  RequirePointer(kernel, "crow (or t_crow)", crow, 1);
  RequirePointer(kernel, "col (or t_row)", col, 1);
}

inline int64_t OutputSize(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride,
                          int64_t dilation) {
  const int64_t room = in + before + after - (kernel - 1) * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;
}

inline ConvGeometry Geometry(const char* kernel, const std::vector<int64_t>& v) {
  if (v.size() != 18)
    Refuse(std::string(kernel) +
           ": geom must be the 18 integers [batch, in_h, in_w, out_h, out_w] + "
           "Conv2dGeometry, got " +
           std::to_string(v.size()));
  const ConvGeometry g{v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6],  v[7],  v[8],
                       v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17]};
  RequireSize(kernel, "batch", g.batch);
  RequireSize(kernel, "in_h and in_w", std::min(g.in_h, g.in_w));
  RequireSize(kernel, "out_channels and in_channels", std::min(g.out_channels, g.in_channels));
  RequireSize(kernel, "kernel, stride, dilation and groups",
              std::min({g.kh, g.kw, g.stride_h, g.stride_w, g.dil_h, g.dil_w, g.groups}), 1);
  RequireSize(kernel, "padding", std::min({g.pad_top, g.pad_left, g.pad_bottom, g.pad_right}));
  if (g.out_channels % g.groups != 0 || g.in_channels % g.groups != 0)
    Refuse(std::string(kernel) + ": channels must be divisible by groups, got " +
           std::to_string(g.out_channels) + " and " + std::to_string(g.in_channels) + " for " +
           std::to_string(g.groups) + " groups");
  // Keeps every size below in 64 bits; no memory holds an image of this size.
  const double limit = double(int64_t(1) << 40);
  const double height = double(g.in_h) + double(g.pad_top) + double(g.pad_bottom);
  const double width = double(g.in_w) + double(g.pad_left) + double(g.pad_right);
  if (!(std::max({height, width, height * width, double(g.kh) * double(g.dil_h),
                  double(g.kw) * double(g.dil_w)}) <= limit))
    Refuse(std::string(kernel) +
           ": the padded image and the dilated kernel must have at most 2^40 pixels, got an "
           "image of " +
           std::to_string(height) + " x " + std::to_string(width));
  const int64_t out_h = OutputSize(g.in_h, g.pad_top, g.pad_bottom, g.kh, g.stride_h, g.dil_h);
  const int64_t out_w = OutputSize(g.in_w, g.pad_left, g.pad_right, g.kw, g.stride_w, g.dil_w);
  if (g.out_h != out_h || g.out_w != out_w)
    Refuse(std::string(kernel) + ": out_h and out_w must be " + std::to_string(out_h) + " and " +
           std::to_string(out_w) + " for this geometry, got " + std::to_string(g.out_h) + " and " +
           std::to_string(g.out_w));
  return g;
}

inline int64_t OutputElements(const ConvGeometry& g) {
  return g.out_channels * g.out_h * g.out_w * g.batch;
}
inline int64_t InputElements(const ConvGeometry& g) {
  return g.in_channels * g.in_h * g.in_w * g.batch;
}

}  // namespace sk
