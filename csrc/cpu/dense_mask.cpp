// Dense-masked storage: the gradient of a dense weight, cleared where no weight exists.
#include "kernels_dense.h"

namespace sk {

void clear_outside(const ClearOutsideArgs& args) {
  float* const grad = args.grad;
  const uint8_t* const mask = args.mask;
  // Bits are and-ed, not multiplied: infinity times zero would be NaN. No branch either: a random
  // mask is mispredicted at every other element.
#pragma omp parallel for simd num_threads(args.threads) schedule(static) if (args.count > 32768)
  for (int64_t i = 0; i < args.count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, grad + i, sizeof bits);
    bits &= 0u - static_cast<uint32_t>(mask[i]);
    __builtin_memcpy(grad + i, &bits, sizeof bits);
  }
}

}  // namespace sk
