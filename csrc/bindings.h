// The parts of the module _native. Each adds its functions to `m`.
#pragma once

#include <pybind11/pybind11.h>

namespace sk {

void bind_dense(pybind11::module_& m);         // batch norm, pooling, dropout
void bind_masked(pybind11::module_& m);        // the mask of a dense weight
void bind_sparse(pybind11::module_& m);        // linear, conv2d, scratch
void bind_wgrad(pybind11::module_& m);         // dense weight gradient
void bind_prepared(pybind11::module_& m);      // the products of a layer, prepared
void bind_variants(pybind11::module_& m);      // which variant of a product serves a problem
void bind_cuda(pybind11::module_& m);          // cuda_* (without CUDA: functions that say why not)
void bind_cuda_dense(pybind11::module_& m);    // batch norm and pooling of those
void bind_cuda_pattern(pybind11::module_& m);  // cuda_* of a pattern change, likewise
void bind_mma(pybind11::module_& m);           // cuda_block_*, the tensor-core kernels

}  // namespace sk
