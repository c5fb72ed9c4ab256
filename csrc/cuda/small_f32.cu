// The small-batch kernels of one type of activations: files of their own compile side by side.
#include "cuda/small.cuh"

namespace sk::cuda {

template void SmallProductOf<float, LinearSource>(const CallName&, const ProductArgs&, int, int);
template void SmallProductOf<float, ConvSource>(const CallName&, const ProductArgs&, int, int);
template void SmallDgradOf<float, LinearTarget>(const CallName&, const DgradArgs&,
                                                const DgradShape&);
template void SmallDgradOf<float, ConvTarget>(const CallName&, const DgradArgs&, const DgradShape&);
template void SmallWgradOf<float, LinearSource>(const CallName&, const WgradArgs&, int, int);
template void SmallWgradOf<float, ConvSource>(const CallName&, const WgradArgs&, int, int);

}  // namespace sk::cuda
