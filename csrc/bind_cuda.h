// What the bindings of the CUDA kernels share.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_checks.h"
#include "bind_geometry.h"
#include "build_config.h"
#include "kernels_cuda.h"

namespace sk {

// A linear layer is passed as the geometry [rows, cols, batch], a convolution as the 18 integers
// of bind_geometry.h.
inline ConvGeometry CudaGeometry(const char* kernel, const std::vector<int64_t>& v) {
  if (v.size() != 3) return Geometry(kernel, v);
  RequireSize(kernel, "rows", v[0]);
  RequireSize(kernel, "cols", v[1]);
  RequireSize(kernel, "batch", v[2]);
  return cuda::LinearGeometry(v[0], v[1], v[2]);
}

#if SK_CUDA

// The geometry of a call, and what every kernel of its kind wants of its pointers.
inline ConvGeometry ProductGeometry(const char* kernel, const std::vector<int64_t>& geometry,
                                    Address y, Address x, Address crow) {
  const ConvGeometry g = CudaGeometry(kernel, geometry);
  RequirePointer(kernel, "y", y, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequirePointer(kernel, "crow", crow, 1);
  return g;
}
inline ConvGeometry DgradGeometry(const char* kernel, const std::vector<int64_t>& geometry,
                                  Address dx, Address grad, Address t_crow) {
  const ConvGeometry g = CudaGeometry(kernel, geometry);
  RequirePointer(kernel, "dx", dx, InputElements(g));
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "t_crow", t_crow, 1);
  return g;
}

inline cuda::Element ElementOf(const char* kernel, int64_t element) {
  if (element < 0 || element > 2)
    Refuse(std::string(kernel) +
           ": element must be 0 (float32), 1 (float16) or 2 (bfloat16), got " +
           std::to_string(element));
  return static_cast<cuda::Element>(element);
}

inline cuda::Place PlaceOf(const char* kernel, int64_t device, Address stream) {
  RequireSize(kernel, "device", device);
  return {static_cast<int>(device), Pointer<void>(stream)};
}

#else

[[noreturn]] inline void NoCuda(const char* kernel) {
  throw std::runtime_error(std::string(kernel) + ": this build has no CUDA kernels (" +
                           SK_CUDA_WHY +
                           "); reinstall with nvcc on PATH and SPARSE_KERNELS_CUDA=ON");
}

#endif

}  // namespace sk
