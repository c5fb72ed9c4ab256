// The small-batch kernels of one type of activations: files of their own compile side by side.
#include "cuda/small.cuh"

namespace sk::cuda {

template void SmallProductOf<__nv_bfloat16, LinearSource>(const CallName&, const ProductArgs&, int,
                                                          int);
template void SmallProductOf<__nv_bfloat16, ConvSource>(const CallName&, const ProductArgs&, int,
                                                        int);
template void SmallDgradOf<__nv_bfloat16, LinearTarget>(const CallName&, const DgradArgs&,
                                                        const DgradShape&);
template void SmallDgradOf<__nv_bfloat16, ConvTarget>(const CallName&, const DgradArgs&,
                                                      const DgradShape&);
template void SmallWgradOf<__nv_bfloat16, LinearSource>(const CallName&, const WgradArgs&, int,
                                                        int);
template void SmallWgradOf<__nv_bfloat16, ConvSource>(const CallName&, const WgradArgs&, int, int);

}  // namespace sk::cuda
