// Bindings of batch norm and pooling on a GPU. Without CUDA in the build the functions exist and
// say why not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_checks.h"
#include "bindings.h"
#include "build_config.h"
#include "kernels_cuda_dense.h"

namespace py = pybind11;

namespace sk {
namespace {

// sizes: channels and elements per channel; place: element type (0 float32, 1 float16, 2 bfloat16),
// device, stream.
using List = std::vector<int64_t>;

void RequireLength(const char* kernel, const char* name, const List& list, size_t length,
                   const char* expected) {
  if (list.size() == length) return;
  Refuse(std::string(kernel) + ": " + name + " must be " + expected + ", got " +
         std::to_string(list.size()) + " integers");
}

struct Where {
  cuda::Element element;
  cuda::Place place;
};

Where WhereOf(const char* kernel, const List& list) {
  RequireLength(kernel, "place", list, 3, "the 3 integers element, device, stream");
  if (list[0] < 0 || list[0] > 2)
    Refuse(std::string(kernel) +
           ": element must be 0 (float32), 1 (float16) or 2 (bfloat16), got " +
           std::to_string(list[0]));
  RequireSize(kernel, "device", list[1]);
  return {static_cast<cuda::Element>(list[0]),
          {static_cast<int>(list[1]), Pointer<void>(static_cast<Address>(list[2]))}};
}

void RequireSizes(const char* kernel, const List& sizes) {
  RequireLength(kernel, "sizes", sizes, 2, "the 2 integers channels, elements of each");
  RequireSize(kernel, "channels", sizes[0]);
  RequireSize(kernel, "elements", sizes[1]);
}

PoolDims PoolDimsOf(const char* kernel, const List& dims) {
  RequireLength(kernel, "dims", dims, 14,
                "the 14 integers batch, channels, in_h, in_w, out_h, out_w, kh, kw, sh, sw, ph, "
                "pw, dh, dw");
  for (size_t i = 0; i < dims.size(); ++i)
    RequireSize(kernel, "each of dims", dims[i], i >= 6 && i != 10 && i != 11 ? 1 : 0);
  return {dims[0], dims[1], dims[2], dims[3],  dims[4],  dims[5],  dims[6],
          dims[7], dims[8], dims[9], dims[10], dims[11], dims[12], dims[13]};
}

// The image that batch norm with pooling reads: batch, channels, height, width.
void RequireShape(const char* kernel, const List& shape) {
  RequireLength(kernel, "shape", shape, 4, "the 4 integers batch, channels, height, width");
  for (size_t i = 0; i < shape.size(); ++i)
    RequireSize(kernel, "each of shape", shape[i], i < 2 ? 0 : 2);
}

#if SK_CUDA

void CudaNorm(Address y, Address x, Address weight, Address bias, Address mean, Address var,
              Address offset, Address residual, Address workspace, int64_t workspace_bytes,
              const List& sizes, bool training, double eps, bool relu, const List& place) {
  const char* kernel = "cuda_batch_norm";
  RequireSizes(kernel, sizes);
  RequirePointer(kernel, "y", y, sizes[0] * sizes[1]);
  RequirePointer(kernel, "x", x, sizes[0] * sizes[1]);
  RequirePointer(kernel, "mean", mean, sizes[0]);
  RequirePointer(kernel, "var", var, sizes[0]);
  RequirePointer(kernel, "offset", offset, sizes[0]);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  const Where where = WhereOf(kernel, place);
  cuda::norm({Pointer<void>(y), Pointer<const void>(x), Pointer<const float>(weight),
              Pointer<const float>(bias), Pointer<float>(mean), Pointer<float>(var),
              Pointer<float>(offset), Pointer<const void>(residual), Pointer<float>(workspace),
              workspace_bytes, sizes[0], sizes[1], training, static_cast<float>(eps), relu,
              where.element, where.place});
}

void CudaNormBackward(Address dx, Address dweight, Address dbias, Address dresidual, Address grad,
                      Address x, Address y, Address weight, Address mean, Address var,
                      Address offset, Address workspace, int64_t workspace_bytes, const List& sizes,
                      bool training, double eps, bool relu, const List& place) {
  const char* kernel = "cuda_batch_norm_backward";
  RequireSizes(kernel, sizes);
  const int64_t elements = sizes[0] * sizes[1];
  RequirePointer(kernel, "dx", dx, elements);
  RequirePointer(kernel, "dweight", dweight, sizes[0]);
  RequirePointer(kernel, "dbias", dbias, sizes[0]);
  RequirePointer(kernel, "grad", grad, elements);
  RequirePointer(kernel, "x", x, elements);
  RequirePointer(kernel, "mean", mean, sizes[0]);
  RequirePointer(kernel, "var", var, sizes[0]);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  Require(!relu || elements == 0 || y != 0 || offset != 0,
          "cuda_batch_norm_backward: with relu, y or offset (which give the ReLU's mask) must be "
          "there, got null for both; pass what the forward pass wrote");
  const Where where = WhereOf(kernel, place);
  cuda::norm_backward({Pointer<void>(dx),
                       Pointer<float>(dweight),
                       Pointer<float>(dbias),
                       Pointer<void>(dresidual),
                       Pointer<const void>(grad),
                       Pointer<const void>(x),
                       Pointer<const void>(y),
                       Pointer<const float>(weight),
                       Pointer<const float>(mean),
                       Pointer<const float>(var),
                       Pointer<const float>(offset),
                       Pointer<float>(workspace),
                       workspace_bytes,
                       sizes[0],
                       sizes[1],
                       training,
                       static_cast<float>(eps),
                       relu,
                       where.element,
                       where.place});
}

int64_t CudaNormWorkspace(const List& sizes, bool training, bool backward) {
  RequireSizes("cuda_batch_norm_workspace", sizes);
  return backward ? cuda::norm_backward_workspace(sizes[0], sizes[1])
                  : cuda::norm_workspace(sizes[0], sizes[1], training);
}

void CudaNormPool(Address y, Address argmax, Address x, Address weight, Address bias, Address mean,
                  Address var, Address rounding, Address workspace, int64_t workspace_bytes,
                  const List& shape, bool training, double eps, const List& place) {
  const char* kernel = "cuda_batch_norm_pool";
  RequireShape(kernel, shape);
  const int64_t channels = shape[1], planes = shape[0] * channels;
  RequirePointer(kernel, "y", y, planes * (shape[2] / 2) * (shape[3] / 2));
  RequirePointer(kernel, "argmax", argmax, planes * (shape[2] / 2) * (shape[3] / 2));
  RequirePointer(kernel, "x", x, planes * shape[2] * shape[3]);
  RequirePointer(kernel, "mean", mean, channels);
  RequirePointer(kernel, "var", var, channels);
  RequirePointer(kernel, "rounding", rounding, channels);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  const Where where = WhereOf(kernel, place);
  cuda::norm_pool({Pointer<void>(y), Pointer<uint8_t>(argmax), Pointer<const void>(x),
                   Pointer<const float>(weight), Pointer<const float>(bias), Pointer<float>(mean),
                   Pointer<float>(var), Pointer<float>(rounding), Pointer<float>(workspace),
                   workspace_bytes, shape[0], channels, shape[2], shape[3], training,
                   static_cast<float>(eps), where.element, where.place});
}

void CudaNormPoolBackward(Address dx, Address dweight, Address dbias, Address grad, Address argmax,
                          Address x, Address weight, Address mean, Address var, Address rounding,
                          Address workspace, int64_t workspace_bytes, const List& shape,
                          bool training, double eps, const List& place) {
  const char* kernel = "cuda_batch_norm_pool_backward";
  RequireShape(kernel, shape);
  const int64_t channels = shape[1], planes = shape[0] * channels;
  RequirePointer(kernel, "dx", dx, planes * shape[2] * shape[3]);
  RequirePointer(kernel, "dweight", dweight, channels);
  RequirePointer(kernel, "dbias", dbias, channels);
  RequirePointer(kernel, "grad", grad, planes * (shape[2] / 2) * (shape[3] / 2));
  RequirePointer(kernel, "argmax", argmax, planes * (shape[2] / 2) * (shape[3] / 2));
  RequirePointer(kernel, "x", x, planes * shape[2] * shape[3]);
  RequirePointer(kernel, "mean", mean, channels);
  RequirePointer(kernel, "var", var, channels);
  RequirePointer(kernel, "rounding", rounding, channels);
  RequirePointer(kernel, "workspace", workspace, workspace_bytes);
  const Where where = WhereOf(kernel, place);
  cuda::norm_pool_backward({Pointer<void>(dx),
                            Pointer<float>(dweight),
                            Pointer<float>(dbias),
                            Pointer<const void>(grad),
                            Pointer<const uint8_t>(argmax),
                            Pointer<const void>(x),
                            Pointer<const float>(weight),
                            Pointer<const float>(mean),
                            Pointer<const float>(var),
                            Pointer<const float>(rounding),
                            Pointer<float>(workspace),
                            workspace_bytes,
                            shape[0],
                            channels,
                            shape[2],
                            shape[3],
                            training,
                            static_cast<float>(eps),
                            where.element,
                            where.place});
}

void CudaPool(const char* kernel, bool backward, bool average, Address to, Address argmax,
              Address from, const List& list, bool count_include_pad, int64_t divisor,
              const List& place) {
  const PoolDims d = PoolDimsOf(kernel, list);
  const int64_t in = d.batch * d.channels * d.in_h * d.in_w;
  const int64_t out = d.batch * d.channels * d.out_h * d.out_w;
  RequirePointer(kernel, "its result", to, backward ? in : out);
  RequirePointer(kernel, "its input", from, backward ? out : in);
  if (!average) RequirePointer(kernel, "argmax", argmax, out);
  const Where where = WhereOf(kernel, place);
  Require(average || (d.kh <= kMaxPoolTaps && d.kw <= kMaxPoolTaps && d.kh * d.kw <= kMaxPoolTaps),
          std::string(kernel) + ": a window may have at most " + std::to_string(kMaxPoolTaps) +
              " taps (argmax is uint8), got " + std::to_string(d.kh) + " x " +
              std::to_string(d.kw) + "; use torch.nn.functional.max_pool2d for it");
  Require(!average || (d.dh == 1 && d.dw == 1), std::string(kernel) + ": dilation must be 1, got " +
                                                    std::to_string(d.dh) + " x " +
                                                    std::to_string(d.dw));
  const cuda::PoolArgs args = {Pointer<void>(to),
                               Pointer<uint8_t>(argmax),
                               Pointer<const void>(from),
                               d,
                               count_include_pad,
                               divisor,
                               where.element,
                               where.place};
  if (average) return backward ? cuda::avg_pool_backward(args) : cuda::avg_pool(args);
  backward ? cuda::max_pool_backward(args) : cuda::max_pool(args);
}

#else

[[noreturn]] void NoCuda(const char* kernel) {
  throw std::runtime_error(std::string(kernel) + ": this build has no CUDA kernels (" +
                           SK_CUDA_WHY +
                           "); reinstall with nvcc on PATH and SPARSE_KERNELS_CUDA=ON");
}
void CudaNorm(Address, Address, Address, Address, Address, Address, Address, Address, Address,
              int64_t, const List& sizes, bool, double, bool, const List& place) {
  RequireSizes("cuda_batch_norm", sizes);
  WhereOf("cuda_batch_norm", place);
  NoCuda("cuda_batch_norm");
}
void CudaNormBackward(Address, Address, Address, Address, Address, Address, Address, Address,
                      Address, Address, Address, Address, int64_t, const List& sizes, bool, double,
                      bool, const List& place) {
  RequireSizes("cuda_batch_norm_backward", sizes);
  WhereOf("cuda_batch_norm_backward", place);
  NoCuda("cuda_batch_norm_backward");
}
int64_t CudaNormWorkspace(const List&, bool, bool) { NoCuda("cuda_batch_norm_workspace"); }
void CudaNormPool(Address, Address, Address, Address, Address, Address, Address, Address, Address,
                  int64_t, const List& shape, bool, double, const List& place) {
  RequireShape("cuda_batch_norm_pool", shape);
  WhereOf("cuda_batch_norm_pool", place);
  NoCuda("cuda_batch_norm_pool");
}
void CudaNormPoolBackward(Address, Address, Address, Address, Address, Address, Address, Address,
                          Address, Address, Address, int64_t, const List& shape, bool, double,
                          const List& place) {
  RequireShape("cuda_batch_norm_pool_backward", shape);
  WhereOf("cuda_batch_norm_pool_backward", place);
  NoCuda("cuda_batch_norm_pool_backward");
}
void CudaPool(const char* kernel, bool, bool, Address, Address, Address, const List& list, bool,
              int64_t, const List& place) {
  PoolDimsOf(kernel, list);
  WhereOf(kernel, place);
  NoCuda(kernel);
}

#endif

}  // namespace

void bind_cuda_dense(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("cuda_batch_norm", &CudaNorm, py::arg("y"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("offset"), py::arg("residual"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("sizes"), py::arg("training"),
        py::arg("eps"), py::arg("relu"), py::arg("place"), Release(),
        "Batch norm (+ residual, ReLU) on a GPU, see kernels_cuda_dense.h.");
  m.def("cuda_batch_norm_backward", &CudaNormBackward, py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::arg("dresidual"), py::arg("grad"), py::arg("x"), py::arg("y"),
        py::arg("weight"), py::arg("mean"), py::arg("var"), py::arg("offset"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("sizes"), py::arg("training"), py::arg("eps"),
        py::arg("relu"), py::arg("place"), Release(), "Its gradients, see kernels_cuda_dense.h.");
  m.def("cuda_batch_norm_workspace", &CudaNormWorkspace, py::arg("sizes"), py::arg("training"),
        py::arg("backward"), "Bytes of workspace that batch norm wants.");
  m.def("cuda_batch_norm_pool", &CudaNormPool, py::arg("y"), py::arg("argmax"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("rounding"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("shape"), py::arg("training"),
        py::arg("eps"), py::arg("place"), Release(),
        "Batch norm, ReLU and 2 x 2 max pooling on a GPU, see kernels_cuda_dense.h.");
  m.def("cuda_batch_norm_pool_backward", &CudaNormPoolBackward, py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::arg("grad"), py::arg("argmax"), py::arg("x"), py::arg("weight"),
        py::arg("mean"), py::arg("var"), py::arg("rounding"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("shape"), py::arg("training"), py::arg("eps"),
        py::arg("place"), Release(), "Its gradients, see kernels_cuda_dense.h.");
  m.def(
      "cuda_max_pool2d",
      [](bool backward, Address to, Address argmax, Address from, const List& dims,
         const List& place) {
        const char* kernel = backward ? "cuda_max_pool2d backward" : "cuda_max_pool2d";
        CudaPool(kernel, backward, false, to, argmax, from, dims, false, 0, place);
      },
      py::arg("backward"), py::arg("to"), py::arg("argmax"), py::arg("source"), py::arg("dims"),
      py::arg("place"), Release(), "Max pooling on a GPU, see kernels_cuda_dense.h.");
  m.def(
      "cuda_avg_pool2d",
      [](bool backward, Address to, Address from, const List& dims, bool count_include_pad,
         int64_t divisor, const List& place) {
        const char* kernel = backward ? "cuda_avg_pool2d backward" : "cuda_avg_pool2d";
        CudaPool(kernel, backward, true, to, 0, from, dims, count_include_pad, divisor, place);
      },
      py::arg("backward"), py::arg("to"), py::arg("source"), py::arg("dims"),
      py::arg("count_include_pad"), py::arg("divisor_override"), py::arg("place"), Release(),
      "Average pooling on a GPU, see kernels_cuda_dense.h.");
}

}  // namespace sk
