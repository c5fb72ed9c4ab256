// The backward kernels of one type of activations: files of their own compile side by side.
#include "cuda/dgrad.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

template void DgradOf<__nv_bfloat16, LinearTarget>(const CallName&, const DgradArgs&,
                                                   const DgradShape&);
template void DgradOf<__nv_bfloat16, ConvTarget>(const CallName&, const DgradArgs&,
                                                 const DgradShape&);
template void WgradOf<__nv_bfloat16, LinearSource>(const CallName&, const WgradArgs&,
                                                   const WgradShape&);
template void WgradOf<__nv_bfloat16, ConvSource>(const CallName&, const WgradArgs&,
                                                 const WgradShape&);

}  // namespace sk::cuda
