// The staged forward kernels of every type of activations.
#include "cuda/staged.cuh"

namespace sk::cuda {

template void StagedOf<float>(const CallName&, const ProductArgs&, int);
template void StagedOf<__half>(const CallName&, const ProductArgs&, int);
template void StagedOf<__nv_bfloat16>(const CallName&, const ProductArgs&, int);

}  // namespace sk::cuda
