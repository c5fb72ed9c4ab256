// The forward kernels of one type of activations: files of their own compile side by side.
#include "cuda/product.cuh"

namespace sk::cuda {

template void ProductOf<float, LinearSource>(const CallName&, const ProductArgs&,
                                             const ProductShape&);
template void ProductOf<float, ConvSource>(const CallName&, const ProductArgs&,
                                           const ProductShape&);

}  // namespace sk::cuda
