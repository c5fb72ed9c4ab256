// Bindings of the tensor-core block kernels. Without CUDA in the build the functions exist and say
// why not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind_cuda.h"
#include "bindings.h"
#include "kernels_mma.h"

namespace py = pybind11;

namespace sk {
namespace {

#if SK_CUDA

void BlockProduct(const char* kernel, Address y, Address x, Address values, Address bias,
                  Address crow, Address col, const std::vector<int64_t>& geometry, int64_t block,
                  bool relu, int64_t element, int64_t device, Address stream) {
  const ConvGeometry g = ProductGeometry(kernel, geometry, y, x, crow);
  cuda::block_product(kernel, {Pointer<void>(y), Pointer<const void>(x),
                               Pointer<const void>(values), Pointer<const float>(bias),
                               Pointer<const int32_t>(crow), Pointer<const int32_t>(col), g, block,
                               relu, ElementOf(kernel, element), PlaceOf(kernel, device, stream)});
}

void BlockDgrad(const char* kernel, Address dx, Address grad, Address values, Address t_crow,
                Address t_row, Address t_perm, const std::vector<int64_t>& geometry, int64_t block,
                int64_t element, int64_t device, Address stream) {
  const ConvGeometry g = DgradGeometry(kernel, geometry, dx, grad, t_crow);
  cuda::block_dgrad(kernel, {Pointer<void>(dx), Pointer<const void>(grad),
                             Pointer<const void>(values), Pointer<const int32_t>(t_crow),
                             Pointer<const int32_t>(t_row), Pointer<const int32_t>(t_perm), g,
                             block, ElementOf(kernel, element), PlaceOf(kernel, device, stream)});
}

void BlockWgrad(const char* kernel, Address dvalues, Address grad, Address x, Address crow,
                Address col, Address workspace, int64_t workspace_bytes,
                const std::vector<int64_t>& geometry, int64_t block, int64_t capacity,
                int64_t element, int64_t device, Address stream) {
  const ConvGeometry g = CudaGeometry(kernel, geometry);
  RequireSize(kernel, "capacity", capacity);
  RequireSize(kernel, "workspace_bytes", workspace_bytes);
  RequirePointer(kernel, "dvalues", dvalues, capacity * block * block);
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequirePointer(kernel, "crow", crow, 1);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  cuda::block_wgrad(
      kernel, {Pointer<float>(dvalues), Pointer<const void>(grad), Pointer<const void>(x),
               Pointer<const int32_t>(crow), Pointer<const int32_t>(col), Pointer<void>(workspace),
               workspace_bytes, g, block, capacity, ElementOf(kernel, element),
               PlaceOf(kernel, device, stream)});
}

int64_t BlockWgradWorkspace(const std::vector<int64_t>& geometry, int64_t block, int64_t capacity,
                            int64_t element) {
  const char* kernel = "cuda_block_wgrad_workspace";
  return cuda::block_wgrad_workspace(CudaGeometry(kernel, geometry), block, capacity,
                                     ElementOf(kernel, element));
}

#else

void BlockProduct(const char* kernel, Address, Address, Address, Address, Address, Address,
                  const std::vector<int64_t>& geometry, int64_t, bool, int64_t, int64_t, Address) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
void BlockDgrad(const char* kernel, Address, Address, Address, Address, Address, Address,
                const std::vector<int64_t>& geometry, int64_t, int64_t, int64_t, Address) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
void BlockWgrad(const char* kernel, Address, Address, Address, Address, Address, Address, int64_t,
                const std::vector<int64_t>& geometry, int64_t, int64_t, int64_t, int64_t, Address) {
  CudaGeometry(kernel, geometry);
  NoCuda(kernel);
}
int64_t BlockWgradWorkspace(const std::vector<int64_t>&, int64_t, int64_t, int64_t) {
  NoCuda("cuda_block_wgrad_workspace");
}

#endif

}  // namespace

void bind_mma(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("cuda_block_product", &BlockProduct, py::arg("kernel"), py::arg("y"), py::arg("x"),
        py::arg("values"), py::arg("bias"), py::arg("crow"), py::arg("col"), py::arg("geometry"),
        py::arg("block"), py::arg("relu"), py::arg("element"), py::arg("device"), py::arg("stream"),
        Release(),
        "Forward with 16 x 16 or 32 x 32 blocks on the tensor cores, see kernels_mma.h. `kernel` "
        "is the name for errors. RuntimeError with CUDA's message.");
  m.def("cuda_block_dgrad", &BlockDgrad, py::arg("kernel"), py::arg("dx"), py::arg("grad"),
        py::arg("values"), py::arg("t_crow"), py::arg("t_row"), py::arg("t_perm"),
        py::arg("geometry"), py::arg("block"), py::arg("element"), py::arg("device"),
        py::arg("stream"), Release(), "Input gradient of the same, see kernels_mma.h.");
  m.def("cuda_block_wgrad", &BlockWgrad, py::arg("kernel"), py::arg("dvalues"), py::arg("grad"),
        py::arg("x"), py::arg("crow"), py::arg("col"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("geometry"), py::arg("block"), py::arg("capacity"),
        py::arg("element"), py::arg("device"), py::arg("stream"), Release(),
        "Gradient of the stored blocks, see kernels_mma.h.");
  m.def("cuda_block_wgrad_workspace", &BlockWgradWorkspace, py::arg("geometry"), py::arg("block"),
        py::arg("capacity"), py::arg("element"), "Bytes of workspace that cuda_block_wgrad wants.");
}

}  // namespace sk
