// The block kernels of bfloat16: a file of their own, so that types compile side by side.
#include "cuda/mma_product.cuh"
#include "cuda/mma_wgrad.cuh"

namespace sk::cuda {

#define SK_BLOCK_KERNELS(B)                                                             \
  template void BlockProductOf<__nv_bfloat16, B, RowWalk>(                              \
      const CallName&, const ProductOperands<__nv_bfloat16>&, const RowWalk::Index&,    \
      const Window&, void*);                                                            \
  template void BlockProductOf<__nv_bfloat16, B, ColumnWalk>(                           \
      const CallName&, const ProductOperands<__nv_bfloat16>&, const ColumnWalk::Index&, \
      const Window&, void*);                                                            \
  template void BlockWgradOf<__nv_bfloat16, B>(const CallName&, const BlockWgradArgs&,  \
                                               const Window&, int, bool);
SK_BLOCK_KERNELS(16)
SK_BLOCK_KERNELS(32)
#undef SK_BLOCK_KERNELS

}  // namespace sk::cuda
