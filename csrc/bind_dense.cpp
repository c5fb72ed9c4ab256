// Bindings of batch norm, pooling and dropout: check the arguments, call the launcher in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind_checks.h"
#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace sk {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void BatchNormForward(Address y, Address x, Address weight, Address bias, Address mean, Address var,
                      Address offset, Address residual, int64_t batch, int64_t channels,
                      int64_t pixels, bool training, double eps, bool relu, int64_t threads) {
  const char* kernel = "batch_norm_forward";
  RequireSize(kernel, "batch", batch);
  RequireSize(kernel, "channels", channels);
  RequireSize(kernel, "pixels", pixels);
  const int64_t elements = batch * channels * pixels;
  RequirePointer(kernel, "y", y, elements);
  RequirePointer(kernel, "x", x, elements);
  RequirePointer(kernel, "mean", mean, channels);
  RequirePointer(kernel, "var", var, channels);
  Require(eps >= 0, "batch_norm_forward: eps must be at least 0, got " + std::to_string(eps));
  RequireThreads(kernel, threads);
  dense_kernels().batch_norm_forward(
      {Pointer<float>(y), Pointer<const float>(x), Pointer<const float>(weight),
       Pointer<const float>(bias), Pointer<float>(mean), Pointer<float>(var),
       Pointer<float>(offset), Pointer<const float>(residual), channels, batch * pixels, training,
       eps, relu, static_cast<int>(threads)});
}

void BatchNormBackward(Address dx, Address dweight, Address dbias, Address dresidual, Address grad,
                       Address x, Address y, Address weight, Address mean, Address var,
                       Address offset, int64_t batch, int64_t channels, int64_t pixels,
                       bool training, double eps, bool relu, int64_t threads) {
  const char* kernel = "batch_norm_backward";
  RequireSize(kernel, "batch", batch);
  RequireSize(kernel, "channels", channels);
  RequireSize(kernel, "pixels", pixels);
  const int64_t elements = batch * channels * pixels;
  RequirePointer(kernel, "grad", grad, elements);
  RequirePointer(kernel, "x", x, elements);
  Require(!relu || elements == 0 || y != 0 || offset != 0,
          "batch_norm_backward: with relu, y or offset (which give the ReLU's mask) must be there, "
          "got null for both; pass what the forward pass wrote");
  RequirePointer(kernel, "mean", mean, channels);
  RequirePointer(kernel, "var", var, channels);
  Require(eps >= 0, "batch_norm_backward: eps must be at least 0, got " + std::to_string(eps));
  RequireThreads(kernel, threads);
  dense_kernels().batch_norm_backward(
      {Pointer<float>(dx), Pointer<float>(dweight), Pointer<float>(dbias),
       Pointer<float>(dresidual), Pointer<const float>(grad), Pointer<const float>(x),
       Pointer<const float>(y), Pointer<const float>(weight), Pointer<const float>(mean),
       Pointer<const float>(var), Pointer<const float>(offset), channels, batch * pixels, training,
       eps, relu, static_cast<int>(threads)});
}

int64_t CheckNormPool(const char* kernel, const std::vector<int64_t>& sizes, double eps,
                      int64_t threads) {
  static const char* const names[4] = {"batch", "channels", "height", "width"};
  Require(sizes.size() == 4, std::string(kernel) +
                                 ": sizes must be the 4 integers batch, channels, height, width, "
                                 "got " +
                                 std::to_string(sizes.size()));
  for (size_t i = 0; i < sizes.size(); ++i) RequireSize(kernel, names[i], sizes[i], i < 2 ? 0 : 2);
  Require(eps >= 0, std::string(kernel) + ": eps must be at least 0, got " + std::to_string(eps));
  RequireThreads(kernel, threads);
  return sizes[0] * sizes[1] * sizes[2] * sizes[3];
}

void BatchNormPool(Address y, Address argmax, Address x, Address weight, Address bias, Address mean,
                   Address var, Address rounding, const std::vector<int64_t>& sizes, bool training,
                   double eps, int64_t threads) {
  const char* kernel = "batch_norm_pool";
  const int64_t elements = CheckNormPool(kernel, sizes, eps, threads);
  RequirePointer(kernel, "y", y, elements / 4);
  RequirePointer(kernel, "argmax", argmax, elements / 4);
  RequirePointer(kernel, "x", x, elements);
  RequirePointer(kernel, "mean", mean, sizes[1]);
  RequirePointer(kernel, "var", var, sizes[1]);
  RequirePointer(kernel, "rounding", rounding, sizes[1]);
  dense_kernels().batch_norm_pool(
      {Pointer<float>(y), Pointer<uint8_t>(argmax), Pointer<const float>(x),
       Pointer<const float>(weight), Pointer<const float>(bias), Pointer<float>(mean),
       Pointer<float>(var), Pointer<float>(rounding), sizes[1], sizes[2], sizes[3], sizes[0],
       training, eps, static_cast<int>(threads)});
}

void BatchNormPoolBackward(Address dx, Address dweight, Address dbias, Address grad, Address argmax,
                           Address x, Address weight, Address mean, Address var, Address rounding,
                           const std::vector<int64_t>& sizes, bool training, double eps,
                           int64_t threads) {
  const char* kernel = "batch_norm_pool_backward";
  const int64_t elements = CheckNormPool(kernel, sizes, eps, threads);
  RequirePointer(kernel, "dx", dx, elements);
  RequirePointer(kernel, "grad", grad, elements / 4);
  RequirePointer(kernel, "argmax", argmax, elements / 4);
  RequirePointer(kernel, "x", x, elements);
  RequirePointer(kernel, "mean", mean, sizes[1]);
  RequirePointer(kernel, "var", var, sizes[1]);
  RequirePointer(kernel, "rounding", rounding, sizes[1]);
  dense_kernels().batch_norm_pool_backward(
      {Pointer<float>(dx), Pointer<float>(dweight), Pointer<float>(dbias),
       Pointer<const float>(grad), Pointer<const uint8_t>(argmax), Pointer<const float>(x),
       Pointer<const float>(weight), Pointer<const float>(mean), Pointer<const float>(var),
       Pointer<const float>(rounding), sizes[1], sizes[2], sizes[3], sizes[0], training, eps,
       static_cast<int>(threads)});
}

PoolDims ParsePoolDims(const char* kernel, const std::vector<int64_t>& dims) {
  static const char* const names[14] = {"batch", "channels", "in_h", "in_w", "out_h",
                                        "out_w", "kh",       "kw",   "sh",   "sw",
                                        "ph",    "pw",       "dh",   "dw"};
  Require(dims.size() == 14, std::string(kernel) +
                                 ": dims must be the 14 integers batch, channels, in_h, in_w, "
                                 "out_h, out_w, kh, kw, sh, sw, ph, pw, dh, dw, got " +
                                 std::to_string(dims.size()));
  for (size_t i = 0; i < dims.size(); ++i) {
    const bool positive = i >= 6 && i != 10 && i != 11;  // kernel, stride and dilation
    RequireSize(kernel, names[i], dims[i], positive ? 1 : 0);
  }
  return {dims[0], dims[1], dims[2], dims[3],  dims[4],  dims[5],  dims[6],
          dims[7], dims[8], dims[9], dims[10], dims[11], dims[12], dims[13]};
}

int64_t InputElements(const PoolDims& d) { return d.batch * d.channels * d.in_h * d.in_w; }
int64_t OutputElements(const PoolDims& d) { return d.batch * d.channels * d.out_h * d.out_w; }

PoolDims CheckMaxPool(const char* kernel, const std::vector<int64_t>& list, int64_t threads) {
  const PoolDims dims = ParsePoolDims(kernel, list);
  Require(dims.kh <= kMaxPoolTaps && dims.kw <= kMaxPoolTaps && dims.kh * dims.kw <= kMaxPoolTaps,
          std::string(kernel) + ": a window may have at most " + std::to_string(kMaxPoolTaps) +
              " taps (argmax is uint8), got " + std::to_string(dims.kh) + " x " +
              std::to_string(dims.kw) + "; use torch.nn.functional.max_pool2d for it");
  RequireThreads(kernel, threads);
  return dims;
}

void MaxPool(Address y, Address argmax, Address x, const std::vector<int64_t>& list,
             int64_t threads) {
  const char* kernel = "max_pool2d";
  const PoolDims dims = CheckMaxPool(kernel, list, threads);
  RequirePointer(kernel, "y", y, OutputElements(dims));
  RequirePointer(kernel, "argmax", argmax, OutputElements(dims));
  RequirePointer(kernel, "x", x, InputElements(dims));
  dense_kernels().max_pool2d({Pointer<float>(y), Pointer<uint8_t>(argmax), Pointer<const float>(x),
                              dims, static_cast<int>(threads)});
}

void MaxPoolBackward(Address dx, Address grad, Address argmax, const std::vector<int64_t>& list,
                     int64_t threads) {
  const char* kernel = "max_pool2d_backward";
  const PoolDims dims = CheckMaxPool(kernel, list, threads);
  RequirePointer(kernel, "dx", dx, InputElements(dims));
  RequirePointer(kernel, "grad", grad, OutputElements(dims));
  RequirePointer(kernel, "argmax", argmax, OutputElements(dims));
  dense_kernels().max_pool2d_backward({Pointer<float>(dx), Pointer<const float>(grad),
                                       Pointer<const uint8_t>(argmax), dims,
                                       static_cast<int>(threads)});
}

PoolDims CheckAvgPool(const char* kernel, const std::vector<int64_t>& list, int64_t threads) {
  const PoolDims dims = ParsePoolDims(kernel, list);
  Require(dims.dh == 1 && dims.dw == 1, std::string(kernel) + ": dilation must be 1, got " +
                                            std::to_string(dims.dh) + " x " +
                                            std::to_string(dims.dw));
  RequireThreads(kernel, threads);
  return dims;
}

void AvgPool(Address y, Address x, const std::vector<int64_t>& list, bool count_include_pad,
             int64_t divisor_override, int64_t threads) {
  const char* kernel = "avg_pool2d";
  const PoolDims dims = CheckAvgPool(kernel, list, threads);
  RequirePointer(kernel, "y", y, OutputElements(dims));
  RequirePointer(kernel, "x", x, InputElements(dims));
  dense_kernels().avg_pool2d({Pointer<float>(y), Pointer<const float>(x), dims, count_include_pad,
                              divisor_override, static_cast<int>(threads)});
}

void AvgPoolBackward(Address dx, Address grad, const std::vector<int64_t>& list,
                     bool count_include_pad, int64_t divisor_override, int64_t threads) {
  const char* kernel = "avg_pool2d_backward";
  const PoolDims dims = CheckAvgPool(kernel, list, threads);
  RequirePointer(kernel, "dx", dx, InputElements(dims));
  RequirePointer(kernel, "grad", grad, OutputElements(dims));
  dense_kernels().avg_pool2d_backward({Pointer<float>(dx), Pointer<const float>(grad), dims,
                                       count_include_pad, divisor_override,
                                       static_cast<int>(threads)});
}

void Dropout(Address y, Address x, int64_t count, int64_t seed, double p, int64_t threads) {
  const char* kernel = "dropout";
  RequireSize(kernel, "count", count);
  RequirePointer(kernel, "y", y, count);
  RequirePointer(kernel, "x", x, count);
  Require(p >= 0 && p <= 1, "dropout: p must be between 0 and 1, got " + std::to_string(p));
  RequireThreads(kernel, threads);
  dense_kernels().dropout({Pointer<float>(y), Pointer<const float>(x), count,
                           static_cast<uint64_t>(seed), p, static_cast<int>(threads)});
}

}  // namespace

void bind_dense(py::module_& m) {
  m.def("batch_norm_forward", &BatchNormForward, py::arg("y"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("offset"), py::arg("residual"),
        py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("training"),
        py::arg("eps"), py::arg("relu"), py::arg("threads"), Release(),
        "See BatchNormForwardArgs.");
  m.def("batch_norm_backward", &BatchNormBackward, py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::arg("dresidual"), py::arg("grad"), py::arg("x"), py::arg("y"),
        py::arg("weight"), py::arg("mean"), py::arg("var"), py::arg("offset"), py::arg("batch"),
        py::arg("channels"), py::arg("pixels"), py::arg("training"), py::arg("eps"),
        py::arg("relu"), py::arg("threads"), Release(), "See BatchNormBackwardArgs.");
  m.def("batch_norm_pool", &BatchNormPool, py::arg("y"), py::arg("argmax"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("rounding"),
        py::arg("sizes"), py::arg("training"), py::arg("eps"), py::arg("threads"), Release(),
        "See BatchNormPoolArgs.");
  m.def("batch_norm_pool_backward", &BatchNormPoolBackward, py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::arg("grad"), py::arg("argmax"), py::arg("x"), py::arg("weight"),
        py::arg("mean"), py::arg("var"), py::arg("rounding"), py::arg("sizes"), py::arg("training"),
        py::arg("eps"), py::arg("threads"), Release(), "See BatchNormPoolBackwardArgs.");
  m.def("max_pool2d", &MaxPool, py::arg("y"), py::arg("argmax"), py::arg("x"), py::arg("dims"),
        py::arg("threads"), Release(), "See MaxPoolArgs.");
  m.def("max_pool2d_backward", &MaxPoolBackward, py::arg("dx"), py::arg("grad"), py::arg("argmax"),
        py::arg("dims"), py::arg("threads"), Release(), "See MaxPoolBackwardArgs.");
  m.def("avg_pool2d", &AvgPool, py::arg("y"), py::arg("x"), py::arg("dims"),
        py::arg("count_include_pad"), py::arg("divisor_override"), py::arg("threads"), Release(),
        "See AvgPoolArgs.");
  m.def("avg_pool2d_backward", &AvgPoolBackward, py::arg("dx"), py::arg("grad"), py::arg("dims"),
        py::arg("count_include_pad"), py::arg("divisor_override"), py::arg("threads"), Release(),
        "See AvgPoolBackwardArgs.");
  m.def("dropout", &Dropout, py::arg("y"), py::arg("x"), py::arg("count"), py::arg("seed"),
        py::arg("p"), py::arg("threads"), Release(), "See DropoutArgs.");
}

}  // namespace sk
