// The backward kernels of one type of activations: files of their own compile side by side.
#include "cuda/dgrad.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

template void DgradOf<float, LinearTarget>(const CallName&, const DgradArgs&, const DgradShape&);
template void DgradOf<float, ConvTarget>(const CallName&, const DgradArgs&, const DgradShape&);
template void WgradOf<float, LinearSource>(const CallName&, const WgradArgs&, const WgradShape&);
template void WgradOf<float, ConvSource>(const CallName&, const WgradArgs&, const WgradShape&);

}  // namespace sk::cuda
