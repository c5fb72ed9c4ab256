// The convolution launchers of one instruction set; csrc/kernels.h documents them.
#pragma once

#include "../kernels.h"
#include "../variants.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {

void conv2d(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
            int64_t capacity, bool relu, ListCache* cache, int threads);
void conv2d_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& geometry,
                  int64_t bh, int64_t bw, int64_t capacity, ListCache* cache, int threads);
void conv2d_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
                  int64_t capacity, int threads);

// plan_print of kernels.h for the passes of a convolution.
uint64_t conv2d_print(const VariantKey& key, Variant variant);
uint64_t conv2d_wgrad_print(const VariantKey& key, Variant variant);

const SparseKernels& sparse_kernels_table();

}  // namespace SK_ISA
}  // namespace sk
