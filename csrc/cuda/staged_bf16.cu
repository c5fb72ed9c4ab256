// The staged kernels of one type of activations.
#include "cuda/staged_dgrad.cuh"

namespace sk::cuda {

template void StagedOf<__nv_bfloat16, LinearSource>(const CallName&, const ProductArgs&,
                                                    const ProductShape&);
template void StagedOf<__nv_bfloat16, ConvSource>(const CallName&, const ProductArgs&,
                                                  const ProductShape&);
template void StagedDgradOf<__nv_bfloat16, LinearTarget>(const CallName&, const DgradArgs&,
                                                         const DgradShape&);
template void StagedDgradOf<__nv_bfloat16, ConvTarget>(const CallName&, const DgradArgs&,
                                                       const DgradShape&);

}  // namespace sk::cuda
