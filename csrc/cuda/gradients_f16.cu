// The backward kernels of one type of activations: files of their own compile side by side.
#include "cuda/dgrad.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

template void DgradOf<__half, LinearTarget>(const CallName&, const DgradArgs&, const DgradShape&);
template void DgradOf<__half, ConvTarget>(const CallName&, const DgradArgs&, const DgradShape&);
template void WgradOf<__half, LinearSource>(const CallName&, const WgradArgs&, const WgradShape&);
template void WgradOf<__half, ConvSource>(const CallName&, const WgradArgs&, const WgradShape&);

}  // namespace sk::cuda
