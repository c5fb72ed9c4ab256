// Bindings of the sparse products: check the arguments, call the launcher in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bind_checks.h"
#include "bindings.h"
#include "cpu/buffer_pool.h"
#include "cpu/dispatch.h"
#include "cpu/list_cache.h"
#include "cpu/scratch.h"
#include "kernels.h"

namespace py = pybind11;

namespace sk {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void RequireWeight(const char* kernel, Address crow, Address col, int64_t bh, int64_t bw,
                   int64_t capacity) {
  RequireSize(kernel, "bh", bh, 1);
  RequireSize(kernel, "bw", bw, 1);
  RequireSize(kernel, "capacity", capacity);
  RequirePointer(kernel, "crow (or t_crow)", crow, 1);
  RequirePointer(kernel, "col (or t_row)", col, 1);
}

struct Matrix {
  int64_t rows, cols, batch;
};

void RequireMatrix(const char* kernel, const Matrix& m) {
  RequireSize(kernel, "rows", m.rows);
  RequireSize(kernel, "cols", m.cols);
  RequireSize(kernel, "batch", m.batch);
}

void Linear(Address y, Address x, Address values, Address bias, Address crow, Address col,
            int64_t rows, int64_t cols, int64_t bh, int64_t bw, int64_t capacity, int64_t batch,
            bool relu, int64_t threads, ListCache* cache) {
  const char* kernel = "linear";
  RequireMatrix(kernel, {rows, cols, batch});
  RequireWeight(kernel, crow, col, bh, bw, capacity);
  RequirePointer(kernel, "y", y, rows * batch);
  RequirePointer(kernel, "x", x, cols * batch);
  RequirePointer(kernel, "values", values, 1);
  RequireThreads(kernel, threads);
  sparse_kernels().linear(Pointer<float>(y), Pointer<const float>(x), Pointer<const float>(values),
                          Pointer<const float>(bias), Pointer<const int32_t>(crow),
                          Pointer<const int32_t>(col), rows, cols, bh, bw, capacity, batch, relu,
                          cache, static_cast<int>(threads));
}

void LinearDgrad(Address dx, Address grad, Address values, Address t_crow, Address t_row,
                 Address t_perm, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
                 int64_t capacity, int64_t batch, int64_t threads, ListCache* cache) {
  const char* kernel = "linear_dgrad";
  RequireMatrix(kernel, {rows, cols, batch});
  RequireWeight(kernel, t_crow, t_row, bh, bw, capacity);
  RequirePointer(kernel, "dx", dx, cols * batch);
  RequirePointer(kernel, "grad", grad, rows * batch);
  RequirePointer(kernel, "values", values, 1);
  RequirePointer(kernel, "t_perm", t_perm, 1);
  RequireThreads(kernel, threads);
  sparse_kernels().linear_dgrad(Pointer<float>(dx), Pointer<const float>(grad),
                                Pointer<const float>(values), Pointer<const int32_t>(t_crow),
                                Pointer<const int32_t>(t_row), Pointer<const int32_t>(t_perm), rows,
                                cols, bh, bw, capacity, batch, cache, static_cast<int>(threads));
}

void LinearWgrad(Address dvalues, Address grad, Address x, Address crow, Address col, int64_t rows,
                 int64_t cols, int64_t bh, int64_t bw, int64_t capacity, int64_t batch,
                 int64_t threads, ListCache* cache) {
  const char* kernel = "linear_wgrad";
  RequireMatrix(kernel, {rows, cols, batch});
  RequireWeight(kernel, crow, col, bh, bw, capacity);
  RequirePointer(kernel, "dvalues", dvalues, capacity);
  RequirePointer(kernel, "grad", grad, rows * batch);
  RequirePointer(kernel, "x", x, cols * batch);
  RequireThreads(kernel, threads);
  sparse_kernels().linear_wgrad(Pointer<float>(dvalues), Pointer<const float>(grad),
                                Pointer<const float>(x), Pointer<const int32_t>(crow),
                                Pointer<const int32_t>(col), rows, cols, bh, bw, capacity, batch,
                                cache, static_cast<int>(threads));
}

int64_t OutputSize(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride,
                   int64_t dilation) {
  const int64_t room = in + before + after - (kernel - 1) * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;
}

ConvGeometry Geometry(const char* kernel, const std::vector<int64_t>& v) {
  Require(v.size() == 18, std::string(kernel) +
                              ": geom must be the 18 integers [batch, in_h, in_w, out_h, out_w] + "
                              "Conv2dGeometry, got " +
                              std::to_string(v.size()));
  const ConvGeometry g{v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6],  v[7],  v[8],
                       v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17]};
  RequireSize(kernel, "batch", g.batch);
  RequireSize(kernel, "in_h and in_w", std::min(g.in_h, g.in_w));
  RequireSize(kernel, "out_channels and in_channels", std::min(g.out_channels, g.in_channels));
  RequireSize(kernel, "kernel, stride, dilation and groups",
              std::min({g.kh, g.kw, g.stride_h, g.stride_w, g.dil_h, g.dil_w, g.groups}), 1);
  RequireSize(kernel, "padding", std::min({g.pad_top, g.pad_left, g.pad_bottom, g.pad_right}));
  Require(g.out_channels % g.groups == 0 && g.in_channels % g.groups == 0,
          std::string(kernel) + ": channels must be divisible by groups, got " +
              std::to_string(g.out_channels) + " and " + std::to_string(g.in_channels) + " for " +
              std::to_string(g.groups) + " groups");
  // Keeps every size below in 64 bits; no memory holds an image of this size.
  const double limit = double(int64_t(1) << 40);
  const double height = double(g.in_h) + double(g.pad_top) + double(g.pad_bottom);
  const double width = double(g.in_w) + double(g.pad_left) + double(g.pad_right);
  Require(std::max({height, width, height * width, double(g.kh) * double(g.dil_h),
                    double(g.kw) * double(g.dil_w)}) <= limit,
          std::string(kernel) +
              ": the padded image and the dilated kernel must have at most 2^40 pixels, got an "
              "image of " +
              std::to_string(height) + " x " + std::to_string(width));
  const int64_t out_h = OutputSize(g.in_h, g.pad_top, g.pad_bottom, g.kh, g.stride_h, g.dil_h);
  const int64_t out_w = OutputSize(g.in_w, g.pad_left, g.pad_right, g.kw, g.stride_w, g.dil_w);
  Require(g.out_h == out_h && g.out_w == out_w,
          std::string(kernel) + ": out_h and out_w must be " + std::to_string(out_h) + " and " +
              std::to_string(out_w) + " for this geometry, got " + std::to_string(g.out_h) +
              " and " + std::to_string(g.out_w));
  return g;
}

int64_t OutputElements(const ConvGeometry& g) {
  return g.out_channels * g.out_h * g.out_w * g.batch;
}
int64_t InputElements(const ConvGeometry& g) { return g.in_channels * g.in_h * g.in_w * g.batch; }

void Conv2d(Address y, Address x, Address values, Address bias, Address crow, Address col,
            const std::vector<int64_t>& geom, int64_t bh, int64_t bw, int64_t capacity, bool relu,
            int64_t threads, ListCache* cache) {
  const char* kernel = "conv2d";
  const ConvGeometry g = Geometry(kernel, geom);
  RequireWeight(kernel, crow, col, bh, bw, capacity);
  RequirePointer(kernel, "y", y, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequirePointer(kernel, "values", values, 1);
  RequireThreads(kernel, threads);
  sparse_kernels().conv2d(Pointer<float>(y), Pointer<const float>(x), Pointer<const float>(values),
                          Pointer<const float>(bias), Pointer<const int32_t>(crow),
                          Pointer<const int32_t>(col), g, bh, bw, capacity, relu, cache,
                          static_cast<int>(threads));
}

void Conv2dDgrad(Address dx, Address grad, Address values, Address t_crow, Address t_row,
                 Address t_perm, const std::vector<int64_t>& geom, int64_t bh, int64_t bw,
                 int64_t capacity, int64_t threads, ListCache* cache) {
  const char* kernel = "conv2d_dgrad";
  const ConvGeometry g = Geometry(kernel, geom);
  RequireWeight(kernel, t_crow, t_row, bh, bw, capacity);
  RequirePointer(kernel, "dx", dx, InputElements(g));
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "values", values, 1);
  RequirePointer(kernel, "t_perm", t_perm, 1);
  RequireThreads(kernel, threads);
  sparse_kernels().conv2d_dgrad(Pointer<float>(dx), Pointer<const float>(grad),
                                Pointer<const float>(values), Pointer<const int32_t>(t_crow),
                                Pointer<const int32_t>(t_row), Pointer<const int32_t>(t_perm), g,
                                bh, bw, capacity, cache, static_cast<int>(threads));
}

void Conv2dWgrad(Address dvalues, Address grad, Address x, Address crow, Address col,
                 const std::vector<int64_t>& geom, int64_t bh, int64_t bw, int64_t capacity,
                 int64_t threads) {
  const char* kernel = "conv2d_wgrad";
  const ConvGeometry g = Geometry(kernel, geom);
  RequireWeight(kernel, crow, col, bh, bw, capacity);
  RequirePointer(kernel, "dvalues", dvalues, capacity);
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequireThreads(kernel, threads);
  sparse_kernels().conv2d_wgrad(Pointer<float>(dvalues), Pointer<const float>(grad),
                                Pointer<const float>(x), Pointer<const int32_t>(crow),
                                Pointer<const int32_t>(col), g, bh, bw, capacity,
                                static_cast<int>(threads));
}

void BindListCache(py::module_& m) {
  py::class_<ListCache>(m, "ListCache",
                        "Lists that products derive from one pattern, kept between calls. Drop it "
                        "when the index arrays change; see csrc/cpu/list_cache.h.")
      .def(py::init<>())
      .def_property_readonly("bytes", &ListCache::bytes, "Memory held.");
  m.def("list_cache_bytes", &ListCache::total_bytes, "Memory held by all ListCaches.");
}

void BindPooledBuffer(py::module_& m) {
  py::class_<PooledBuffer>(m, "PooledBuffer", py::buffer_protocol(),
                           "Uninitialised memory that goes back to a pool; see "
                           "csrc/cpu/buffer_pool.h. The argument is its size in bytes.")
      .def(py::init<size_t>())
      .def_buffer([](PooledBuffer& b) {
        return py::buffer_info(static_cast<uint8_t*>(b.data()), py::ssize_t(b.bytes()));
      });
  m.def("pooled_bytes", &pooled_bytes, "Bytes in use through PooledBuffers and kept for reuse.");
  m.def("pooled_live", &pooled_live, "Bytes in use through PooledBuffers.");
  m.def("release_pooled", &release_pooled, "Free what no PooledBuffer uses.");
}

void BindLinear(py::module_& m) {
  m.def("linear", &Linear, py::arg("y"), py::arg("x"), py::arg("values"), py::arg("bias"),
        py::arg("crow"), py::arg("col"), py::arg("rows"), py::arg("cols"), py::arg("bh"),
        py::arg("bw"), py::arg("capacity"), py::arg("batch"), py::arg("relu"), py::arg("threads"),
        py::arg("cache") = nullptr, Release(),
        "y = relu(W x + bias); see csrc/kernels.h. Damaged index contents raise ValueError.");
  m.def("linear_dgrad", &LinearDgrad, py::arg("dx"), py::arg("grad"), py::arg("values"),
        py::arg("t_crow"), py::arg("t_row"), py::arg("t_perm"), py::arg("rows"), py::arg("cols"),
        py::arg("bh"), py::arg("bw"), py::arg("capacity"), py::arg("batch"), py::arg("threads"),
        py::arg("cache") = nullptr, Release(), "dx = W^T grad; see csrc/kernels.h.");
  m.def("linear_wgrad", &LinearWgrad, py::arg("dvalues"), py::arg("grad"), py::arg("x"),
        py::arg("crow"), py::arg("col"), py::arg("rows"), py::arg("cols"), py::arg("bh"),
        py::arg("bw"), py::arg("capacity"), py::arg("batch"), py::arg("threads"),
        py::arg("cache") = nullptr, Release(),
        "dvalues = grad x^T at the pattern; see csrc/kernels.h.");
}

void BindConv2d(py::module_& m) {
  m.def(
      "conv2d", &Conv2d, py::arg("y"), py::arg("x"), py::arg("values"), py::arg("bias"),
      py::arg("crow"), py::arg("col"), py::arg("geom"), py::arg("bh"), py::arg("bw"),
      py::arg("capacity"), py::arg("relu"), py::arg("threads"), py::arg("cache") = nullptr,
      Release(),
      "y = relu(conv(x, W) + bias); see csrc/kernels.h. Damaged index contents raise ValueError.");
  m.def("conv2d_dgrad", &Conv2dDgrad, py::arg("dx"), py::arg("grad"), py::arg("values"),
        py::arg("t_crow"), py::arg("t_row"), py::arg("t_perm"), py::arg("geom"), py::arg("bh"),
        py::arg("bw"), py::arg("capacity"), py::arg("threads"), py::arg("cache") = nullptr,
        Release(), "dx: the transposed convolution of grad; see csrc/kernels.h.");
  m.def("conv2d_wgrad", &Conv2dWgrad, py::arg("dvalues"), py::arg("grad"), py::arg("x"),
        py::arg("crow"), py::arg("col"), py::arg("geom"), py::arg("bh"), py::arg("bw"),
        py::arg("capacity"), py::arg("threads"), Release(),
        "dvalues: the weight's gradient at the pattern; see csrc/kernels.h.");
}

}  // namespace

void bind_sparse(py::module_& m) {
  BindListCache(m);
  BindPooledBuffer(m);
  BindLinear(m);
  BindConv2d(m);
  m.def("scratch_bytes", &scratch_bytes, "Bytes held by native scratch now, over all threads.");
  m.def("scratch_peak", &scratch_peak,
        "Most bytes of native scratch held at once since the start or release_scratch().");
  m.def("release_scratch", &release_scratch, Release(),
        "Free the scratch that is not in use, and reset its peak.");
}

}  // namespace sk
