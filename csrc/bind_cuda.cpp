// Bindings of the CUDA kernels. Without CUDA in the build the functions exist and say why not.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind_checks.h"
#include "bindings.h"
#include "build_config.h"
#if SK_CUDA
#include "cuda/linear.cuh"
#endif

namespace py = pybind11;

namespace sk {
namespace {

void CudaLinear(Address y, Address x, Address values, Address bias, Address crow, Address col,
                int64_t rows, int64_t cols, int64_t batch, bool relu, int64_t device,
                Address stream) {
#if SK_CUDA
  const char* kernel = "cuda_linear";
  RequireSize(kernel, "rows", rows);
  RequireSize(kernel, "cols", cols);
  RequireSize(kernel, "batch", batch);
  RequireSize(kernel, "device", device);
  RequirePointer(kernel, "y", y, rows * batch);
  RequirePointer(kernel, "x", x, cols * batch);
  RequirePointer(kernel, "crow", crow, rows + 1);
  cuda::linear({Pointer<float>(y), Pointer<const float>(x), Pointer<const float>(values),
                Pointer<const float>(bias), Pointer<const int32_t>(crow),
                Pointer<const int32_t>(col), rows, cols, batch, relu, static_cast<int>(device),
                Pointer<void>(stream)});
#else
  (void)y, (void)x, (void)values, (void)bias, (void)crow, (void)col, (void)rows, (void)cols;
  (void)batch, (void)relu, (void)device, (void)stream;
  throw std::runtime_error(std::string("cuda_linear: this build has no CUDA kernels (") +
                           SK_CUDA_WHY +
                           "); reinstall with nvcc on PATH and SPARSE_KERNELS_CUDA=ON");
#endif
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_linear", &CudaLinear, py::arg("y"), py::arg("x"), py::arg("values"), py::arg("bias"),
        py::arg("crow"), py::arg("col"), py::arg("rows"), py::arg("cols"), py::arg("batch"),
        py::arg("relu"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Element SpMM on a GPU, see cuda/linear.cuh. RuntimeError with CUDA's message.");
}

}  // namespace sk
