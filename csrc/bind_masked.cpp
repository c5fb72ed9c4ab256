// What dense-masked storage needs beside torch's own products.
#include "bind_checks.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "kernels_dense.h"

namespace py = pybind11;

namespace sk {
namespace {

void ClearOutside(Address out, Address grad, Address mask, int64_t count, int64_t threads) {
  RequireSize("clear_outside", "count", count);
  RequirePointer("clear_outside", "out", out, count);
  RequirePointer("clear_outside", "grad", grad, count);
  RequirePointer("clear_outside", "mask", mask, count);
  RequireThreads("clear_outside", threads);
  clear_outside({Pointer<float>(out), Pointer<const float>(grad), Pointer<const uint8_t>(mask),
                 count, static_cast<int>(threads)});
}

void TransposeEach(Address dst, Address src, int64_t count, int64_t rows, int64_t cols,
                   int64_t threads) {
  RequireSize("transpose_each", "count", count);
  RequireSize("transpose_each", "rows", rows);
  RequireSize("transpose_each", "cols", cols);
  const int64_t elements = count * rows * cols;
  RequirePointer("transpose_each", "dst", dst, elements);
  RequirePointer("transpose_each", "src", src, elements);
  RequireThreads("transpose_each", threads);
  if (elements == 0) return;
  dense_kernels().transpose({Pointer<float>(dst), Pointer<const float>(src), count, rows, cols,
                             rows * cols, cols, rows * cols, rows, static_cast<int>(threads)});
}

}  // namespace

void bind_masked(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("clear_outside", &ClearOutside, py::arg("out"), py::arg("grad"), py::arg("mask"),
        py::arg("count"), py::arg("threads"), Release(),
        "out[i] = grad[i] where mask[i] is 1, else 0; float32, out may be grad, mask one byte of 0 "
        "or 1 per element.");
  m.def("transpose_each", &TransposeEach, py::arg("dst"), py::arg("src"), py::arg("count"),
        py::arg("rows"), py::arg("cols"), py::arg("threads"), Release(),
        "dst[i][c][r] = src[i][r][c] for `count` matrices; float32, both contiguous.");
}

}  // namespace sk
