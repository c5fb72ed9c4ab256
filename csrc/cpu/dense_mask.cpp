// Dense-masked storage: the gradient of a dense weight, cleared where no weight exists.
#include <algorithm>

#include "kernels_dense.h"

namespace sk {
namespace {

constexpr int64_t kChunk = 1 << 15;

// A float's bits; GCC and clang let this type look at any memory.
typedef uint32_t __attribute__((may_alias)) Bits;

// Bits are and-ed, not multiplied: infinity times zero would be NaN. No branch either: a random
// mask is mispredicted at every other element. `out` is `grad` or shares nothing with it, so that
// iterations are independent, which is what the pragma says.
void Clear(Bits* out, const Bits* grad, const uint8_t* __restrict mask, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = grad[i] & (0u - static_cast<uint32_t>(mask[i]));
}

}  // namespace

void clear_outside(const ClearOutsideArgs& args) {
  Bits* const out = reinterpret_cast<Bits*>(args.out);
  const Bits* const grad = reinterpret_cast<const Bits*>(args.grad);
  // Not an `if` clause of the pragma: GCC then leaves the serial branch without vectors.
  if (args.count <= kChunk || args.threads == 1) {
    Clear(out, grad, args.mask, args.count);
    return;
  }
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t i = 0; i < args.count; i += kChunk) {
    Clear(out + i, grad + i, args.mask + i, std::min(kChunk, args.count - i));
  }
}

}  // namespace sk
