// Bindings of the sparse products: check the arguments, call the launcher in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind_geometry.h"
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
                 int64_t threads, ListCache* cache) {
  const char* kernel = "conv2d_wgrad";
  const ConvGeometry g = Geometry(kernel, geom);
  RequireWeight(kernel, crow, col, bh, bw, capacity);
  RequirePointer(kernel, "dvalues", dvalues, capacity);
  RequirePointer(kernel, "grad", grad, OutputElements(g));
  RequirePointer(kernel, "x", x, InputElements(g));
  RequireThreads(kernel, threads);
  sparse_kernels().conv2d_wgrad(Pointer<float>(dvalues), Pointer<const float>(grad),
                                Pointer<const float>(x), Pointer<const int32_t>(crow),
                                Pointer<const int32_t>(col), g, bh, bw, capacity, cache,
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
        py::arg("capacity"), py::arg("threads"), py::arg("cache") = nullptr, Release(),
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
