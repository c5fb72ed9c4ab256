// The input gradient by scattering: for layers whose gradient is much larger than what is done with
// it (few input channels).
//
// The product of sparse_product.h packs the gradient, because a line of it is usually read many
// times. With 3 input channels it is read once or twice, and packing costs more than the products.
// Here each row of the gradient is read from memory once, front to back, and added with its weights
// to the few rows of dx that it reaches, which stay in the cache.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {

// Whether scattering is expected to be faster, from the shape and the number of stored elements.
bool scatters(const ConvGeometry& g, int64_t stored);

// conv2d_dgrad of kernels.h for a pattern that was checked. Threads own rows of dx; each element
// sums over gradient rows, output channels and taps in this order, whatever their number.
void scatter_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                   const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& g, int64_t bh,
                   int64_t bw, int threads);

}  // namespace SK_ISA
}  // namespace sk
