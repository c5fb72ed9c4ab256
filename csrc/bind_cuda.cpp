// Bindings of the CUDA kernels. Without CUDA in the build the functions exist and say why not.
#include "bind_cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace sk {
namespace {

#if SK_CUDA

cuda::Variant VariantOf(const char* kernel, int64_t variant) {
  if (variant < 0 || variant > 3)
    Refuse(std::string(kernel) +
           ": variant must be 0 (chosen), 1 (direct), 2 (staged) or 3 (small), got " +
           std::to_string(variant));
  return static_cast<cuda::Variant>(variant);
}

void CudaProduct(const char* kernel, Address y, Address x, Address values, Address bias,
                 Address crow, Address col, const std::vector<int64_t>& geometry, int64_t bh,
                 bool relu, int64_t variant, int64_t element, int64_t device, Address stream,
                 Address order) {
  const ConvGeometry g = ProductGeometry(kernel, geometry, y, x, crow);
  cuda::product(kernel, {Pointer<void>(y), Pointer<const void>(x), Pointer<const float>(values),
                         Pointer<const float>(bias), Pointer<const int32_t>(crow),
                         Pointer<const int32_t>(col), Pointer<const int32_t>(order), g, bh, relu,
                         VariantOf(kernel, variant), ElementOf(kernel, element),
                         PlaceOf(kernel, device, stream)});
}

void CudaDgrad(const char* kernel, Address dx, Address grad, Address values, Address t_crow,
               Address t_row, Address t_perm, const std::vector<int64_t>& geometry, int64_t bh,
               int64_t element, int64_t device, Address stream, int64_t variant, Address order) {
  const ConvGeometry g = DgradGeometry(kernel, geometry, dx, grad, t_crow);
  cuda::dgrad(kernel, {Pointer<void>(dx), Pointer<const void>(grad), Pointer<const float>(values),
                       Pointer<const int32_t>(t_crow), Pointer<const int32_t>(t_row),
                       Pointer<const int32_t>(t_perm), Pointer<const int32_t>(order), g, bh,
                       VariantOf(kernel, variant), ElementOf(kernel, element),
                       PlaceOf(kernel, device, stream)});
}

void CudaWgrad(const char* kernel, Address dvalues, Address grad, Address x, Address crow,
               Address col, Address workspace, int64_t workspace_bytes,
               const std::vector<int64_t>& geometry, int64_t bh, int64_t capacity, int64_t element,
               int64_t device, Address stream, int64_t variant) {
  const ConvGeometry g = CudaGeometry(kernel, geometry);
  RequireSize(kernel, "capacity", capacity);
  RequireSize(kernel, "workspace_bytes", workspace_bytes);
  RequirePointer(kernel, "dvalues", dvalues, capacity * bh);
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequirePointer(kernel, "crow", crow, 1);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  cuda::wgrad(kernel,
              {Pointer<float>(dvalues), Pointer<const void>(grad), Pointer<const void>(x),
               Pointer<const int32_t>(crow), Pointer<const int32_t>(col), Pointer<void>(workspace),
               workspace_bytes, g, bh, capacity, VariantOf(kernel, variant),
               ElementOf(kernel, element), PlaceOf(kernel, device, stream)});
}

int64_t CudaWgradWorkspace(const std::vector<int64_t>& geometry, int64_t bh, int64_t capacity,
                           int64_t variant) {
  constexpr char kName[] = "cuda_wgrad_workspace";
  RequireSize(kName, "bh", bh, 1);
  RequireSize(kName, "capacity", capacity);
  return cuda::wgrad_workspace(CudaGeometry(kName, geometry), bh, capacity,
                               VariantOf(kName, variant));
}

std::string CudaUnusable(int64_t device) {
  return cuda::why_unusable(PlaceOf("cuda_unusable", device, 0).device);
}

#else

void CudaProduct(const char* kernel, Address, Address, Address, Address, Address, Address,
                 const std::vector<int64_t>& geometry, int64_t, bool, int64_t, int64_t, int64_t,
                 Address, Address) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
void CudaDgrad(const char* kernel, Address, Address, Address, Address, Address, Address,
               const std::vector<int64_t>& geometry, int64_t, int64_t, int64_t, Address, int64_t,
               Address) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
void CudaWgrad(const char* kernel, Address, Address, Address, Address, Address, Address, int64_t,
               const std::vector<int64_t>& geometry, int64_t, int64_t, int64_t, int64_t, Address,
               int64_t) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
int64_t CudaWgradWorkspace(const std::vector<int64_t>&, int64_t, int64_t, int64_t) {
  NoCuda("cuda_wgrad_workspace");
}
std::string CudaUnusable(int64_t) { NoCuda("cuda_unusable"); }

#endif

}  // namespace

void bind_cuda(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("cuda_product", &CudaProduct, py::arg("kernel"), py::arg("y"), py::arg("x"),
        py::arg("values"), py::arg("bias"), py::arg("crow"), py::arg("col"), py::arg("geometry"),
        py::arg("bh"), py::arg("relu"), py::arg("variant"), py::arg("element"), py::arg("device"),
        py::arg("stream"), py::arg("order") = 0, Release(),
        "Forward of a linear layer or a convolution on a GPU, see kernels_cuda.h. `kernel` is the "
        "name for errors. RuntimeError with CUDA's message.");
  m.def("cuda_dgrad", &CudaDgrad, py::arg("kernel"), py::arg("dx"), py::arg("grad"),
        py::arg("values"), py::arg("t_crow"), py::arg("t_row"), py::arg("t_perm"),
        py::arg("geometry"), py::arg("bh"), py::arg("element"), py::arg("device"),
        py::arg("stream"), py::arg("variant") = 0, py::arg("order") = 0, Release(),
        "Input gradient on a GPU, see kernels_cuda.h.");
  m.def("cuda_wgrad", &CudaWgrad, py::arg("kernel"), py::arg("dvalues"), py::arg("grad"),
        py::arg("x"), py::arg("crow"), py::arg("col"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("geometry"), py::arg("bh"), py::arg("capacity"),
        py::arg("element"), py::arg("device"), py::arg("stream"), py::arg("variant") = 0, Release(),
        "Gradient of the values at the pattern on a GPU, see kernels_cuda.h.");
  m.def("cuda_wgrad_workspace", &CudaWgradWorkspace, py::arg("geometry"), py::arg("bh"),
        py::arg("capacity"), py::arg("variant") = 0, "Bytes of workspace that cuda_wgrad wants.");
  m.def("cuda_unusable", &CudaUnusable, py::arg("device"), Release(),
        "Why these kernels cannot run on a device (its architecture, the driver); empty if they "
        "can.");
}

}  // namespace sk
