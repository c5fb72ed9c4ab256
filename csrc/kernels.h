// The launchers of the sparse product: what each computes, pointer by pointer. No torch, no Python.
//
// Common to all of them:
//   memory     host; float32 and int32; owned by the caller and only borrowed for the call. Inputs
//   and outputs must not
//              overlap. float pointers need 4-byte alignment; 64 bytes let the stores bypass the
//              cache.
//   activation feature-major, no gaps: [features][batch], or [channels][height][width][batch].
//   W          the sparse weight as a matrix [rows, cols] in blocks [bh, bw] (see
//   sparse_kernels/pattern.py):
//     values   [capacity][bh][bw]; blocks past crow's last entry are never read
//     crow     [block_rows + 1], col [capacity]: block columns, sorted within a block row
//     t_crow   [block_cols + 1], t_row, t_perm [capacity]: block rows sorted within a block column,
//     and the place in values
//              entries of a partial block outside the matrix are never read, and get a gradient of
//              exactly 0
//   bias       [rows] or null; relu: max(., 0) after the bias, NaN passes
//   output     every element is written, whatever the pattern, also where nothing is stored
//   threads    >= 1, how many OpenMP threads to use; results do not depend on it, to the last bit
//   cache      keeps the lists that a product derives from the index arrays, or null: derive them
//   anew. Whoever
//              passes one vouches that the index arrays are those of its first use; they are not
//              looked at again.
//   capacity   of values and of the index arrays that the launcher takes; nothing is read past it
//   scratch    one lease of scratch.h per call. Products: per stored element 4 bytes, and 8 for the
//              lists (in the cache, if there is one); per output row 16, and 8 per band and
//              vertical tap, at most 64 bands. Per thread, sums of one pixel block: 16 vectors per
//              output row; and one slab: at most 320 KB, or, where the channels of the fewest
//              pixels and batch entries that a kernel takes at once (`least`) are more than 80 KB,
//              at most min(4 * least, max(32 MB, 2 * least)). conv2d_dgrad of few input channels
//              packs nothing: 16 bytes per stored element, 4 per output channel. wgrad packs
//              nothing: 40 bytes per stored element (lists, in the cache if there is one, and up to
//              8 partial sums; stored elements of partial blocks count in full), 128 * taps + 4 per
//              block row, and 96 * taps per thread. The linear launchers' own kernels (blocks of
//              one column): per thread the columns of x (dgrad: of the output gradient) times one
//              group of lanes, at most 256 bytes each, unless the batch is one group of whole
//              vectors; 4 bytes per stored element in dgrad; 4 per block row and band. Never rows x
//              cols, never an im2col matrix.
//   errors     std::invalid_argument, before anything is written, if the index arrays are damaged
//              (offsets that do not start at 0, decrease or exceed the capacity; indices out of
//              range or not increasing within a line) or if a tile (wgrad: the pixels of a band of
//              channels) is beyond 32-bit offsets
//              (conv2d_dgrad with a stride: some phases may be written before). That t_* describes
//              the same pattern as crow and col is not checked. std::bad_alloc; the output may then
//              be partly written. Shapes and array lengths are the caller's to check.
#pragma once

#include <cstdint>

namespace sk {

class ListCache;    // cpu/list_cache.h
struct VariantKey;  // variants.h
enum class Variant;

// A convolution: torch.nn.functional.conv2d with asymmetric zero padding. Matrix: rows =
// out_channels in `groups` segments, cols = kh*kw taps of in_channels/groups; no block spans two
// groups or two taps.
struct ConvGeometry {
  int64_t batch, in_h, in_w, out_h, out_w;
  int64_t out_channels, in_channels, kh, kw;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dil_h, dil_w;
  int64_t groups;
};

struct SparseKernels {
  // y [rows][batch] = relu(W x + bias), x [cols][batch].
  void (*linear)(float* y, const float* x, const float* values, const float* bias,
                 const int32_t* crow, const int32_t* col, int64_t rows, int64_t cols, int64_t bh,
                 int64_t bw, int64_t capacity, int64_t batch, bool relu, ListCache* cache,
                 int threads);
  // dx [cols][batch] = W^T grad, grad [rows][batch].
  void (*linear_dgrad)(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                       const int32_t* t_row, const int32_t* t_perm, int64_t rows, int64_t cols,
                       int64_t bh, int64_t bw, int64_t capacity, int64_t batch, ListCache* cache,
                       int threads);
  // dvalues [capacity][bh][bw] = (grad x^T) at the pattern, zero past the last stored block.
  void (*linear_wgrad)(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                       const int32_t* col, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
                       int64_t capacity, int64_t batch, ListCache* cache, int threads);
  // y [out_channels][out_h][out_w][batch] = relu(conv(x, W) + bias), x
  // [in_channels][in_h][in_w][batch].
  void (*conv2d)(float* y, const float* x, const float* values, const float* bias,
                 const int32_t* crow, const int32_t* col, const ConvGeometry& geometry, int64_t bh,
                 int64_t bw, int64_t capacity, bool relu, ListCache* cache, int threads);
  // dx (like x) from grad (like y): the transposed convolution.
  void (*conv2d_dgrad)(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                       const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& geometry,
                       int64_t bh, int64_t bw, int64_t capacity, ListCache* cache, int threads);
  // dvalues [capacity][bh][bw]: the weight's gradient at the pattern, zero past the last stored
  // block.
  void (*conv2d_wgrad)(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                       const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
                       int64_t capacity, ListCache* cache, int threads);
  // A number that tells apart how `variant` serves a problem from how others do: a variant that
  // does not apply to it has the number of kRule. Throws as plan_product and plan_wgrad do.
  uint64_t (*plan_print)(const VariantKey& key, Variant variant);
};

// Each instruction set's build defines `const SparseKernels& sparse_kernels_table()` in its
// namespace sk::<isa> (csrc/cpu/linear.cpp); dispatch.h chooses one as sk::sparse_kernels().

}  // namespace sk
