// The small-batch kernels of one type of activations: files of their own compile side by side.
#include "cuda/small.cuh"

namespace sk::cuda {

template void SmallProductOf<__half, LinearSource>(const CallName&, const ProductArgs&, int, int);
template void SmallProductOf<__half, ConvSource>(const CallName&, const ProductArgs&, int, int);
template void SmallDgradOf<__half, LinearTarget>(const CallName&, const DgradArgs&,
                                                 const DgradShape&);
template void SmallDgradOf<__half, ConvTarget>(const CallName&, const DgradArgs&,
                                               const DgradShape&);
template void SmallWgradOf<__half, LinearSource>(const CallName&, const WgradArgs&, int, int);
template void SmallWgradOf<__half, ConvSource>(const CallName&, const WgradArgs&, int, int);

}  // namespace sk::cuda
