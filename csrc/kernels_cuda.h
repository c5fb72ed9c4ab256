// The launchers of the sparse product on a GPU: what each computes, pointer by pointer. No torch.
//
// Common to all of them:
//   memory      of GPU `device`, owned by the caller. Nothing is allocated; the work is queued on
//               `stream` and not waited for. No pointer but the stream may be a host address.
//               Inputs and outputs must not overlap.
//   activation  float32, float16 or bfloat16 (`element`), feature-major without gaps:
//               [features][batch], or [channels][height][width][batch]. Alignment of its element;
//               where it is 16 bytes and the batch a multiple of 4, loads are wide; elsewhere lanes
//               move single elements, 32 neighbours at a time.
//   values      float32 [capacity][bh], blocks of one column: bh = 1 is element sparsity. Sums are
//               float32, rounded once on the way out.
//   W, crow, col, t_crow, t_row, t_perm, bias (float32), relu, output   as kernels.h says, with
//               bw = 1. The index arrays are trusted: they are on the GPU, and no launcher waits.
//   order       a permutation of the rows that the kernel computes, longest first, so that the
//               warps of a thread block end together; null: as they come. Results do not depend on
//               it: one that is out of date costs time. The small-batch kernels do without.
//   sums        have a fixed order: equal calls give equal bits, on every GPU, where the
//               activations' addresses allow the same width of loads (wgrad's lanes depend on it).
//   errors      std::runtime_error with the kernel, its shape and CUDA's message when a CUDA call
//               fails; std::invalid_argument, before anything is queued, for what is not served.
//               A kernel that fails while it runs shows at a later call, as CUDA has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace sk::cuda {

enum class Element { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t kMaxBlockHeight = 32;

// How a product is computed. kStaged serves layers of one group whose batch and addresses are
// multiples of 16 bytes (weight gradients: of 4 bytes), forward with bh <= 16, input gradients with
// strides of 1; kSmall serves at most 16 points (output pixels x batch; of the input for
// gradients). kChosen is kSmall where that serves, else kDirect.
enum class Variant { kChosen = 0, kDirect = 1, kStaged = 2, kSmall = 3 };

struct Place {
  int device;    // CUDA ordinal
  void* stream;  // cudaStream_t of `device`; null is the default stream
};

// y = relu?(W x + bias). For a linear layer the geometry is that of a 1 x 1 image (LinearGeometry).
struct ProductArgs {
  void* y;               // [out_channels][out_h][out_w][batch], written
  const void* x;         // [in_channels][in_h][in_w][batch]
  const float* values;   // [capacity][bh]
  const float* bias;     // [out_channels] or null
  const int32_t* crow;   // [block_rows + 1]
  const int32_t* col;    // [capacity]
  const int32_t* order;  // [block_rows], see above, or null
  ConvGeometry geometry;
  int64_t bh;
  bool relu;
  Variant variant;
  Element element;
  Place place;
};
void product(const char* name, const ProductArgs& args);

// dx = W^T grad (transposed convolution).
struct DgradArgs {
  void* dx;               // like x above, written
  const void* grad;       // like y above
  const float* values;    // [capacity][bh]
  const int32_t* t_crow;  // [cols + 1]
  const int32_t* t_row;   // [capacity]
  const int32_t* t_perm;  // [capacity]
  const int32_t* order;   // [in_channels], see above, or null
  ConvGeometry geometry;
  int64_t bh;
  Variant variant;
  Element element;
  Place place;
};
void dgrad(const char* name, const DgradArgs& args);

// dvalues = the gradient of W at the pattern; zero past the last stored block and outside of
// partial blocks.
struct WgradArgs {
  float* dvalues;       // [capacity][bh], written
  const void* grad;     // like y above
  const void* x;        // like x above
  const int32_t* crow;  // [block_rows + 1]
  const int32_t* col;   // [capacity]
  void* workspace;      // wgrad_workspace bytes, 4-byte aligned; null where that is 0
  int64_t workspace_bytes;
  ConvGeometry geometry;
  int64_t bh;
  int64_t capacity;
  Variant variant;
  Element element;
  Place place;
};
void wgrad(const char* name, const WgradArgs& args);

// Bytes of workspace that wgrad wants: one copy of dvalues per part of a long sum. At most 64, and
// no more than a GPU needs to be busy: less than one copy of dvalues and 0.6 MB; of kStaged, which
// cuts dvalues into fewer thread blocks, one copy and 10 MB times the density.
int64_t wgrad_workspace(const ConvGeometry& geometry, int64_t bh, int64_t capacity,
                        Variant variant = Variant::kChosen);

// Why the kernels of this build cannot run on a device: no such device, an older driver than the
// runtime wants, an architecture that nothing was compiled for. Empty if they can.
std::string why_unusable(int device);

// A linear layer [rows, cols] as a convolution.
inline ConvGeometry LinearGeometry(int64_t rows, int64_t cols, int64_t batch) {
  return {batch, 1, 1, 1, 1, rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1};
}

}  // namespace sk::cuda
