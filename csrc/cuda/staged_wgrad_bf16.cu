// The staged weight gradient of one type of activations.
#include "cuda/staged_wgrad.cuh"

namespace sk::cuda {

template void StagedWgradOf<__nv_bfloat16, LinearSource>(const CallName&, const WgradArgs&,
                                                         const WgradShape&);
template void StagedWgradOf<__nv_bfloat16, ConvSource>(const CallName&, const WgradArgs&,
                                                       const WgradShape&);

}  // namespace sk::cuda
