// The linear launchers: a linear layer is a convolution of one pixel by one tap, and takes its
// kernels as they are. Also the table of all sparse launchers of this instruction set.
#include "conv2d.h"

namespace sk {
namespace SK_ISA {
namespace {

ConvGeometry one_pixel(int64_t rows, int64_t cols, int64_t batch) {
  return {batch, 1, 1, 1, 1, rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1};
}

void linear(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
            int64_t capacity, int64_t batch, bool relu, ListCache* cache, int threads) {
  conv2d(y, x, values, bias, crow, col, one_pixel(rows, cols, batch), bh, bw, capacity, relu, cache,
         threads);
}

void linear_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, int64_t rows, int64_t cols,
                  int64_t bh, int64_t bw, int64_t capacity, int64_t batch, ListCache* cache,
                  int threads) {
  conv2d_dgrad(dx, grad, values, t_crow, t_row, t_perm, one_pixel(rows, cols, batch), bh, bw,
               capacity, cache, threads);
}

void linear_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
                  int64_t capacity, int64_t batch, int threads) {
  conv2d_wgrad(dvalues, grad, x, crow, col, one_pixel(rows, cols, batch), bh, bw, capacity,
               threads);
}

}  // namespace

const SparseKernels& sparse_kernels_table() {
  static const SparseKernels table = {linear, linear_dgrad, linear_wgrad,
                                      conv2d, conv2d_dgrad, conv2d_wgrad};
  return table;
}

}  // namespace SK_ISA
}  // namespace sk
