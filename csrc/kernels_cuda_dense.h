// The launchers of the dense part of a step on a GPU: batch norm and pooling over feature-major
// activations. Memory, activations, order and errors are as kernels_cuda.h says; `weight`, `bias`
// and statistics are float32. What each computes is said in kernels_dense.h.
#pragma once

#include <cstdint>

#include "kernels_cuda.h"
#include "kernels_dense.h"

namespace sk::cuda {

// y = relu?((x - mean) / sqrt(var + eps) * weight + bias [+ residual]), per channel.
struct NormArgs {
  void* y;               // [channels][count], written
  const void* x;         // [channels][count]
  const float* weight;   // [channels] or null (ones)
  const float* bias;     // [channels] or null (zeros)
  float* mean;           // [channels], written when training, else read
  float* var;            // [channels], biased variance, likewise; of no elements: NaN, both
  float* offset;         // [channels], written: the bias, corrected for the rounding of mean
  const void* residual;  // [channels][count] or null
  float* workspace;      // norm_workspace bytes, 4-byte aligned; null where that is 0
  int64_t workspace_bytes;
  int64_t channels, count;
  bool training;
  float eps;
  bool relu;
  Element element;
  Place place;
};
void norm(const NormArgs& args);

// Gradients of the above. With relu either y or offset must be there: y says where it is positive,
// else that is recomputed from x, which is right without a residual only.
struct NormBackwardArgs {
  void* dx;             // [channels][count], written
  float* dweight;       // [channels], written
  float* dbias;         // [channels], written
  void* dresidual;      // [channels][count] or null
  const void* grad;     // [channels][count]
  const void* x;        // [channels][count]
  const void* y;        // [channels][count] or null, read if relu
  const float* weight;  // [channels] or null (ones)
  const float* mean;    // [channels], this and the next two as the forward pass left them
  const float* var;     // [channels]
  const float* offset;  // [channels] or null
  float* workspace;     // norm_backward_workspace bytes, 4-byte aligned
  int64_t workspace_bytes;
  int64_t channels, count;
  bool training;
  float eps;
  bool relu;
  Element element;
  Place place;
};
void norm_backward(const NormBackwardArgs& args);

// y = the maximum of 2 x 2 pixels, stride 2, of relu of the above; no residual. The normalised
// image is not written. The last row and column of an odd image are in no window.
struct NormPoolArgs {
  void* y;              // [channels][height / 2][width / 2][batch], written
  uint8_t* argmax;      // like y, written: 2 * ky + kx, or 255 where y is 0
  const void* x;        // [channels][height][width][batch]
  const float* weight;  // [channels] or null (ones)
  const float* bias;    // [channels] or null (zeros)
  float* mean;          // [channels], this and var as in NormArgs
  float* var;           // [channels]
  float* rounding;      // [channels], written: the exact mean is mean + rounding
  float* workspace;     // norm_workspace bytes, 4-byte aligned; null where that is 0
  int64_t workspace_bytes;
  int64_t batch, channels, height, width;  // of x; height and width at least 2
  bool training;
  float eps;
  Element element;
  Place place;
};
void norm_pool(const NormPoolArgs& args);

struct NormPoolBackwardArgs {
  void* dx;               // like x, written
  float* dweight;         // [channels], written
  float* dbias;           // [channels], written
  const void* grad;       // like y
  const uint8_t* argmax;  // like y, this and what follows as the forward pass left it
  const void* x;
  const float* weight;    // [channels] or null (ones)
  const float* mean;      // [channels]
  const float* var;       // [channels]
  const float* rounding;  // [channels]
  float* workspace;       // norm_backward_workspace bytes of y's elements, 4-byte aligned
  int64_t workspace_bytes;
  int64_t batch, channels, height, width;
  bool training;
  float eps;
  Element element;
  Place place;
};
void norm_pool_backward(const NormPoolBackwardArgs& args);

// Bytes of workspace: partial sums, at most 64 parts per channel.
int64_t norm_workspace(int64_t channels, int64_t count, bool training);
int64_t norm_backward_workspace(int64_t channels, int64_t count);

// One pooling, forward or backward. argmax is null for averages, which use the last two members:
// as AvgPoolArgs has them.
struct PoolArgs {
  void* to;          // forward y [channels][out_h][out_w][batch], backward dx, like x; written
  uint8_t* argmax;   // like y, written by the forward pass and read by the backward pass
  const void* from;  // forward x [channels][in_h][in_w][batch], backward grad, like y
  PoolDims dims;
  bool count_include_pad;
  int64_t divisor;
  Element element;
  Place place;
};
void max_pool(const PoolArgs& args);
void max_pool_backward(const PoolArgs& args);
void avg_pool(const PoolArgs& args);
void avg_pool_backward(const PoolArgs& args);

}  // namespace sk::cuda
