// The staged kernels of one type of activations.
#include "cuda/staged_dgrad.cuh"

namespace sk::cuda {

template void StagedOf<float, LinearSource>(const CallName&, const ProductArgs&,
                                            const ProductShape&);
template void StagedOf<float, ConvSource>(const CallName&, const ProductArgs&, const ProductShape&);
template void StagedDgradOf<float, LinearTarget>(const CallName&, const DgradArgs&,
                                                 const DgradShape&);
template void StagedDgradOf<float, ConvTarget>(const CallName&, const DgradArgs&,
                                               const DgradShape&);

}  // namespace sk::cuda
