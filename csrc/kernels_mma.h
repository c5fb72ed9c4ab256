// The launchers of the products with 16 x 16 and 32 x 32 blocks on the tensor cores (mma.sync):
// what each computes, pointer by pointer. No torch.
//
// Common to all of them, beside what kernels_cuda.h says of memory, order and errors:
//   activation  batch-major without gaps: [batch][features], or channels_last
//               [batch][height][width][channels]; float32, float16 or bfloat16 (`element`),
//               aligned as its element. Multiples of 16 bytes (address and channels of a group)
//               are copied asynchronously and in whole.
//   products    of float16 and bfloat16 as they are, of float32 rounded to TF32; sums in float32,
//               rounded once on the way out.
//   values      [capacity][block][block] of the same `element`, 16-byte aligned. Entries outside of
//               partial blocks, and blocks past the stored ones, are not read.
//   dvalues     float32 [capacity][block][block], 16-byte aligned, written in whole: 0 outside of
//               partial blocks and past the stored ones.
//   block       16 or 32: both sides.
#pragma once

#include "kernels_cuda.h"

namespace sk::cuda {

// y = relu?(W x + bias).
struct BlockProductArgs {
  void* y;        // [batch][out_h][out_w][out_channels], written
  const void* x;  // [batch][in_h][in_w][in_channels]
  const void* values;
  const float* bias;  // [out_channels] or null
  const int32_t* crow;
  const int32_t* col;
  ConvGeometry geometry;
  int64_t block;
  bool relu;
  Element element;
  Place place;
};
void block_product(const char* name, const BlockProductArgs& args);

// dx = W^T grad (transposed convolution).
struct BlockDgradArgs {
  void* dx;          // like x above, written
  const void* grad;  // like y above
  const void* values;
  const int32_t* t_crow;
  const int32_t* t_row;
  const int32_t* t_perm;
  ConvGeometry geometry;
  int64_t block;
  Element element;
  Place place;
};
void block_dgrad(const char* name, const BlockDgradArgs& args);

// dvalues = the gradient of W at the pattern.
struct BlockWgradArgs {
  float* dvalues;
  const void* grad;  // like y above
  const void* x;     // like x above
  const int32_t* crow;
  const int32_t* col;
  void* workspace;  // block_wgrad_workspace bytes, 16-byte aligned; null where that is 0
  int64_t workspace_bytes;
  ConvGeometry geometry;
  int64_t block;
  int64_t capacity;
  Element element;
  Place place;
};
void block_wgrad(const char* name, const BlockWgradArgs& args);

// Bytes of workspace that block_wgrad wants: one copy of dvalues per part of a long sum, at most 64
// of them and 64 MiB. Depends on nothing else: not on the pattern, not on the GPU.
int64_t block_wgrad_workspace(const ConvGeometry& geometry, int64_t block, int64_t capacity,
                              Element element);

}  // namespace sk::cuda
