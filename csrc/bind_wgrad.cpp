// Binding of the dense weight gradient from tiles: checks the arguments, calls the launcher in use.
#include <algorithm>

#include "bind_checks.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "kernels_dense.h"

namespace py = pybind11;

namespace sk {
namespace {

// Channels, image and padding, checked; the pointers and threads of the result are not set.
TileWgradArgs Sizes(const char* kernel, int64_t batch, int64_t out_channels, int64_t in_channels,
                    int64_t in_h, int64_t in_w, int64_t pad_top, int64_t pad_left, int64_t out_h,
                    int64_t out_w) {
  RequireSize(kernel, "batch", batch, 1);
  RequireSize(kernel, "out_channels and in_channels", std::min(out_channels, in_channels), 1);
  RequireSize(kernel, "in_h and in_w", std::min(in_h, in_w), 1);
  RequireSize(kernel, "out_h and out_w", std::min(out_h, out_w), 1);
  RequireSize(kernel, "pad_top and pad_left", std::min(pad_top, pad_left));
  TileWgradArgs args{};
  args.batch = batch;
  args.out_channels = out_channels;
  args.in_channels = in_channels;
  args.in_h = in_h;
  args.in_w = in_w;
  args.out_h = out_h;
  args.out_w = out_w;
  args.pad_top = pad_top;
  args.pad_left = pad_left;
  return args;
}

int64_t Scratch(int64_t batch, int64_t out_channels, int64_t in_channels, int64_t in_h,
                int64_t in_w, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w) {
  return dense_kernels().wgrad_tiles_scratch(Sizes("wgrad_tiles_scratch", batch, out_channels,
                                                   in_channels, in_h, in_w, pad_top, pad_left,
                                                   out_h, out_w));
}

void WgradTiles(Address dw, Address grad, Address x, Address scratch, int64_t floats, int64_t batch,
                int64_t out_channels, int64_t in_channels, int64_t in_h, int64_t in_w,
                int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t threads) {
  const char* kernel = "wgrad_tiles";
  TileWgradArgs args =
      Sizes(kernel, batch, out_channels, in_channels, in_h, in_w, pad_top, pad_left, out_h, out_w);
  RequirePointer(kernel, "dw", dw, out_channels * 9 * in_channels);
  RequirePointer(kernel, "grad", grad, out_channels * out_h * out_w * batch);
  RequirePointer(kernel, "x", x, in_channels * in_h * in_w * batch);
  RequirePointer(kernel, "scratch", scratch, 1);
  const int64_t needed = dense_kernels().wgrad_tiles_scratch(args);
  Require(floats >= needed, "wgrad_tiles: scratch must have at least " + std::to_string(needed) +
                                " floats (wgrad_tiles_scratch), got " + std::to_string(floats));
  RequireThreads(kernel, threads);
  args.dw = Pointer<float>(dw);
  args.grad = Pointer<const float>(grad);
  args.x = Pointer<const float>(x);
  args.scratch = Pointer<float>(scratch);
  args.threads = static_cast<int>(threads);
  dense_kernels().wgrad_tiles(args);
}

}  // namespace

void bind_wgrad(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("wgrad_tiles_scratch", &Scratch, py::arg("batch"), py::arg("out_channels"),
        py::arg("in_channels"), py::arg("in_h"), py::arg("in_w"), py::arg("pad_top"),
        py::arg("pad_left"), py::arg("out_h"), py::arg("out_w"),
        "Floats of scratch that wgrad_tiles needs for these sizes and the instruction set in use.");
  m.def("wgrad_tiles", &WgradTiles, py::arg("dw"), py::arg("grad"), py::arg("x"),
        py::arg("scratch"), py::arg("floats"), py::arg("batch"), py::arg("out_channels"),
        py::arg("in_channels"), py::arg("in_h"), py::arg("in_w"), py::arg("pad_top"),
        py::arg("pad_left"), py::arg("out_h"), py::arg("out_w"), py::arg("threads"), Release(),
        "dw [out_channels][9][in_channels]: the dense weight gradient of a 3x3 convolution of "
        "stride 1, of grad [out_channels][out_h][out_w][batch] and x "
        "[in_channels][in_h][in_w][batch]. scratch: `floats` floats, aligned to 64 bytes.");
}

}  // namespace sk
