// The staged weight gradient of one type of activations.
#include "cuda/staged_wgrad.cuh"

namespace sk::cuda {

template void StagedWgradOf<__half, LinearSource>(const CallName&, const WgradArgs&,
                                                  const WgradShape&);
template void StagedWgradOf<__half, ConvSource>(const CallName&, const WgradArgs&,
                                                const WgradShape&);

}  // namespace sk::cuda
