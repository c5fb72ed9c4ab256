// Launchers of the dense part of a step that must keep the feature-major layout: layout conversion,
// batch norm, pooling, dropout.
//
// Conventions. Every pointer is host memory owned by the caller, float32 unless said otherwise,
// needs no alignment beyond that of its type, and must not overlap an output. "feature-major"
// means the batch is innermost: [C][H][W][N] for activations. A launcher uses `threads` OpenMP
// threads (>= 1), allocates nothing, holds no scratch beyond its stack and what it is given, throws
// nothing, and its result does not depend on `threads` in a single bit.
#pragma once

#include <cstdint>

namespace sk {

// dst[i * dst_outer + c * dst_pitch + r] = src[i * src_outer + r * src_pitch + c], that is `count`
// transpositions of a rows x cols matrix. All sizes and pitches in elements.
struct TransposeArgs {
  float* dst;
  const float* src;
  int64_t count;      // matrices
  int64_t rows;       // of one matrix in src
  int64_t cols;       // of one matrix in src
  int64_t src_outer;  // from one matrix to the next in src
  int64_t src_pitch;  // from one row to the next in src, >= cols
  int64_t dst_outer;
  int64_t dst_pitch;  // >= rows
  int threads;
};

// out[i] = grad[i] where mask[i] is 1, else 0. Plain code of no instruction set: bound by memory.
struct ClearOutsideArgs {
  float* out;           // [count], written; may be grad itself
  const float* grad;    // [count]
  const uint8_t* mask;  // [count], 0 or 1
  int64_t count;
  int threads;
};

void clear_outside(const ClearOutsideArgs&);

// sums[c] = the sum of row c: the gradient of a bias, from the gradient of the output it was added
// to. Each row is summed in fixed chunks, in double between them.
struct ChannelSumsArgs {
  float* sums;       // [channels], written
  const float* src;  // [channels][count]
  int64_t channels;
  int64_t count;
  int threads;
};

// y = relu?((x - mean) / sqrt(var + eps) * weight + bias [+ residual]), per channel.
struct BatchNormForwardArgs {
  float* y;               // [channels][count], written; may be x itself
  const float* x;         // [channels][count]
  const float* weight;    // [channels] or null (ones)
  const float* bias;      // [channels] or null (zeros)
  float* mean;            // [channels], written when training, else read
  float* var;             // [channels], biased variance, written when training, else read
  float* offset;          // [channels] or null, written: y = (x - mean) * scale + offset, that is
                          // the bias, corrected for the rounding of mean to float
  const float* residual;  // [channels][count] or null
  int64_t channels;
  int64_t count;  // pixels * batch, elements per channel
  bool training;
  double eps;
  bool relu;
  int threads;
};

// Gradients of the above. `grad` is that of y after the ReLU. With relu either y or offset must be
// there: y says where it is positive, else that is recomputed from x, which is right without a
// residual only.
struct BatchNormBackwardArgs {
  float* dx;            // [channels][count] or null (not wanted)
  float* dweight;       // [channels] or null
  float* dbias;         // [channels] or null
  float* dresidual;     // [channels][count] or null
  const float* grad;    // [channels][count]
  const float* x;       // [channels][count]
  const float* y;       // [channels][count] or null, read if relu
  const float* weight;  // [channels] or null (ones)
  const float* mean;    // [channels], as the forward pass left it
  const float* var;     // [channels], as the forward pass left it
  const float* offset;  // [channels], as the forward pass left it, or null; read if relu without y
  int64_t channels;
  int64_t count;
  bool training;
  double eps;
  bool relu;
  int threads;
};

// y = the maximum of relu((x - mean) / sqrt(var + eps) * weight + bias) over windows of 2 x 2
// pixels (stride 2, no padding), for which the normalised image is never written.
struct BatchNormPoolArgs {
  float* y;             // [channels][height / 2][width / 2][batch], written
  uint8_t* argmax;      // same shape, written: 2 * ky + kx of the maximum as in MaxPoolArgs, or
                        // kNoTap where y is 0: the ReLU passes no gradient there
  const float* x;       // [channels][height][width][batch]
  const float* weight;  // [channels] or null (ones)
  const float* bias;    // [channels] or null (zeros)
  float* mean;          // [channels], written when training, else read
  float* var;           // [channels], biased variance, written when training, else read
  float* rounding;      // [channels], written: mean before its rounding to float, minus mean
  int64_t channels, height, width, batch;
  bool training;
  double eps;
  int threads;
};

struct BatchNormPoolBackwardArgs {
  float* dx;              // [channels][height][width][batch], written
  float* dweight;         // [channels] or null
  float* dbias;           // [channels] or null
  const float* grad;      // [channels][height / 2][width / 2][batch]
  const uint8_t* argmax;  // this and the following as the forward pass left or read them
  const float* x;
  const float* weight;
  const float* mean;
  const float* var;
  const float* rounding;
  int64_t channels, height, width, batch;
  bool training;
  double eps;
  int threads;
};

// Sizes of a pooling, in pixels. Window (oy, ox) has its first tap at (oy * sh - ph, ox * sw - pw).
struct PoolDims {
  int64_t batch, channels;
  int64_t in_h, in_w, out_h, out_w;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
};

// Taps of a max pooling window that argmax can name; 255 says "no tap inside the image".
constexpr int64_t kMaxPoolTaps = 255;
constexpr uint8_t kNoTap = 255;

struct MaxPoolArgs {
  float* y;         // [channels][out_h][out_w][batch], written
  uint8_t* argmax;  // same shape, written: ky * kw + kx of the largest value (the first one; the
                    // last NaN if there is a NaN), or kNoTap
  const float* x;   // [channels][in_h][in_w][batch]
  PoolDims dims;
  int threads;
};

struct MaxPoolBackwardArgs {
  float* dx;              // [channels][in_h][in_w][batch], written
  const float* grad;      // [channels][out_h][out_w][batch]
  const uint8_t* argmax;  // as the forward pass left it
  PoolDims dims;
  int threads;
};

// Average over the taps inside the image; divided by `divisor` if it is not 0, else by the number
// of taps inside the image, or, with count_include_pad, inside the image and its padding.
struct AvgPoolArgs {
  float* y;        // [channels][out_h][out_w][batch], written
  const float* x;  // [channels][in_h][in_w][batch]
  PoolDims dims;
  bool count_include_pad;
  int64_t divisor;
  int threads;
};

struct AvgPoolBackwardArgs {
  float* dx;          // [channels][in_h][in_w][batch], written
  const float* grad;  // [channels][out_h][out_w][batch]
  PoolDims dims;
  bool count_include_pad;
  int64_t divisor;
  int threads;
};

// y = x / (1 - p), or x * 0 with probability p (in multiples of 2^-32), for each element on its
// own. Which one is a function of (seed, position in memory) alone: the same call with a gradient
// for x is the backward pass.
struct DropoutArgs {
  float* y;        // [count], written
  const float* x;  // [count]
  int64_t count;
  uint64_t seed;
  double p;  // in [0, 1]
  int threads;
};

// The dense weight gradient of a 3x3 convolution of stride 1 without dilation or groups, for the
// growth signal: dw[o][3 * ky + kx][i] = the sum over the batch and output pixels (y, x) of
// grad[o][y][x] * x[i][y + ky - pad_top][x + kx - pad_left], outside of the image zero. From
// transformed tiles of 2x2 gradient pixels, 16 multiplications instead of 36; batch >= 1, channels
// >= 1, out_h and out_w >= 1.
struct TileWgradArgs {
  float* dw;          // [out_channels][9][in_channels], written
  const float* grad;  // [out_channels][out_h][out_w][batch]
  const float* x;     // [in_channels][in_h][in_w][batch]
  float* scratch;     // [wgrad_tiles_scratch(same sizes)], aligned to 64 bytes; contents undefined
  int64_t batch, out_channels, in_channels;
  int64_t in_h, in_w, out_h, out_w;
  int64_t pad_top, pad_left;
  int threads;
};

// One instruction set's launchers.
struct DenseKernels {
  void (*transpose)(const TransposeArgs&);
  void (*channel_sums)(const ChannelSumsArgs&);
  void (*batch_norm_forward)(const BatchNormForwardArgs&);
  void (*batch_norm_backward)(const BatchNormBackwardArgs&);
  void (*batch_norm_pool)(const BatchNormPoolArgs&);
  void (*batch_norm_pool_backward)(const BatchNormPoolBackwardArgs&);
  void (*max_pool2d)(const MaxPoolArgs&);
  void (*max_pool2d_backward)(const MaxPoolBackwardArgs&);
  void (*avg_pool2d)(const AvgPoolArgs&);
  void (*avg_pool2d_backward)(const AvgPoolBackwardArgs&);
  void (*dropout)(const DropoutArgs&);
  void (*wgrad_tiles)(const TileWgradArgs&);
  int64_t (*wgrad_tiles_scratch)(const TileWgradArgs&);  // floats; reads no pointer
};

#ifdef SK_ISA
namespace SK_ISA {
void transpose(const TransposeArgs&);
void channel_sums(const ChannelSumsArgs&);
void batch_norm_forward(const BatchNormForwardArgs&);
void batch_norm_backward(const BatchNormBackwardArgs&);
void batch_norm_pool(const BatchNormPoolArgs&);
void batch_norm_pool_backward(const BatchNormPoolBackwardArgs&);
void max_pool2d(const MaxPoolArgs&);
void max_pool2d_backward(const MaxPoolBackwardArgs&);
void avg_pool2d(const AvgPoolArgs&);
void avg_pool2d_backward(const AvgPoolBackwardArgs&);
void dropout(const DropoutArgs&);
void wgrad_tiles(const TileWgradArgs&);
int64_t wgrad_tiles_scratch(const TileWgradArgs&);

const DenseKernels& dense_kernels_table();
}  // namespace SK_ISA
#endif

}  // namespace sk
