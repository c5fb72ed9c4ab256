// The staged kernels of one type of activations.
#include "cuda/staged_dgrad.cuh"

namespace sk::cuda {

template void StagedOf<__half, LinearSource>(const CallName&, const ProductArgs&,
                                             const ProductShape&);
template void StagedOf<__half, ConvSource>(const CallName&, const ProductArgs&,
                                           const ProductShape&);
template void StagedDgradOf<__half, LinearTarget>(const CallName&, const DgradArgs&,
                                                  const DgradShape&);
template void StagedDgradOf<__half, ConvTarget>(const CallName&, const DgradArgs&,
                                                const DgradShape&);

}  // namespace sk::cuda
