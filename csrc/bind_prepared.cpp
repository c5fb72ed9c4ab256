// A sparse layer's products with everything checked and converted that a step does not change.
//
// A call of a launcher from Python converts some twenty arguments and checks them, which takes as
// long as a small product. The index arrays and the geometry of a layer change once in some hundred
// steps: they are given once, and a step hands over what is left. Forward and backward are one call
// each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "bind_geometry.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/list_cache.h"
#include "kernels.h"
#include "kernels_dense.h"

namespace py = pybind11;

namespace sk {
namespace {

// Multiply-adds, some 5 microseconds, below which another thread costs more than it brings.
constexpr double kThreadPays = 1 << 16;

class PreparedProduct {
 public:
  // `index`: addresses of crow, col, t_crow, t_row, t_perm, which must outlive every call; the two
  // caches belong to them (list_cache.h).
  PreparedProduct(const std::vector<Address>& index, const std::vector<int64_t>& geom, bool linear,
                  int64_t bh, int64_t bw, int64_t capacity, py::object forward_lists,
                  py::object backward_lists)
      : linear_(linear), bh_(bh), bw_(bw), capacity_(capacity) {
    const char* kernel = "PreparedProduct";
    Require(index.size() == 5, "PreparedProduct: index must be five addresses");
    g_ = Geometry(kernel, geom);
    RequireWeight(kernel, index[0], index[1], bh, bw, capacity);
    RequireWeight(kernel, index[2], index[3], bh, bw, capacity);
    RequirePointer(kernel, "t_perm", index[4], 1);
    crow_ = Pointer<const int32_t>(index[0]);
    col_ = Pointer<const int32_t>(index[1]);
    t_crow_ = Pointer<const int32_t>(index[2]);
    t_row_ = Pointer<const int32_t>(index[3]);
    t_perm_ = Pointer<const int32_t>(index[4]);
    forward_cache_ = forward_lists.cast<ListCache*>();
    backward_cache_ = backward_lists.cast<ListCache*>();
    owners_ = py::make_tuple(std::move(forward_lists), std::move(backward_lists));
  }

  void Forward(Address y, Address x, Address values, Address bias, int64_t batch,
               int64_t threads) const {
    const char* kernel = linear_ ? "linear" : "conv2d";
    const ConvGeometry g = Checked(kernel, batch, threads);
    RequirePointer(kernel, "y", y, OutputElements(g));
    RequirePointer(kernel, "x", x, InputElements(g));
    RequirePointer(kernel, "values", values, 1);
    const SparseKernels& k = sparse_kernels();
    const int useful = Useful(g, threads);
    auto* out = Pointer<float>(y);
    const auto *in = Pointer<const float>(x), *v = Pointer<const float>(values);
    const auto* b = Pointer<const float>(bias);
    if (linear_) {
      k.linear(out, in, v, b, crow_, col_, g.out_channels, g.in_channels, bh_, bw_, capacity_,
               batch, false, forward_cache_, useful);
    } else {
      k.conv2d(out, in, v, b, crow_, col_, g, bh_, bw_, capacity_, false, forward_cache_, useful);
    }
  }

  // What is null is not wanted.
  void Backward(Address dx, Address dvalues, Address dbias, Address grad, Address x, Address values,
                int64_t batch, int64_t threads) const {
    const char* kernel = linear_ ? "linear_backward" : "conv2d_backward";
    const ConvGeometry g = Checked(kernel, batch, threads);
    RequirePointer(kernel, "grad", grad, OutputElements(g));
    RequirePointer(kernel, "x", x, dvalues ? InputElements(g) : 0);
    RequirePointer(kernel, "values", values, dx ? 1 : 0);
    const int useful = Useful(g, threads);
    if (dx) Dgrad(Pointer<float>(dx), grad, values, g, useful);
    if (dvalues) Wgrad(Pointer<float>(dvalues), grad, x, g, useful);
    if (dbias) {
      dense_kernels().channel_sums({Pointer<float>(dbias), Pointer<const float>(grad),
                                    g.out_channels, g.out_h * g.out_w * batch, int(threads)});
    }
  }

 private:
  ConvGeometry Checked(const char* kernel, int64_t batch, int64_t threads) const {
    RequireSize(kernel, "batch", batch);
    RequireThreads(kernel, threads);
    ConvGeometry g = g_;
    g.batch = batch;
    return g;
  }

  // Of `threads` so many as have work enough to pay for waking them; results do not depend on it.
  int Useful(const ConvGeometry& g, int64_t threads) const {
    const double pixels = double(g.batch) * double(g.out_h) * double(g.out_w);
    const double useful = 1 + double(capacity_) * double(bh_ * bw_) * pixels / kThreadPays;
    return useful < double(threads) ? int(useful) : int(threads);
  }

  void Dgrad(float* dx, Address grad, Address values, const ConvGeometry& g, int threads) const {
    const auto *in = Pointer<const float>(grad), *v = Pointer<const float>(values);
    const SparseKernels& k = sparse_kernels();
    if (linear_) {
      k.linear_dgrad(dx, in, v, t_crow_, t_row_, t_perm_, g.out_channels, g.in_channels, bh_, bw_,
                     capacity_, g.batch, backward_cache_, threads);
    } else {
      k.conv2d_dgrad(dx, in, v, t_crow_, t_row_, t_perm_, g, bh_, bw_, capacity_, backward_cache_,
                     threads);
    }
  }

  void Wgrad(float* dvalues, Address grad, Address x, const ConvGeometry& g, int threads) const {
    const auto *dy = Pointer<const float>(grad), *in = Pointer<const float>(x);
    const SparseKernels& k = sparse_kernels();
    if (linear_) {
      k.linear_wgrad(dvalues, dy, in, crow_, col_, g.out_channels, g.in_channels, bh_, bw_,
                     capacity_, g.batch, forward_cache_, threads);
    } else {
      k.conv2d_wgrad(dvalues, dy, in, crow_, col_, g, bh_, bw_, capacity_, forward_cache_, threads);
    }
  }

  bool linear_;
  int64_t bh_, bw_, capacity_;
  ConvGeometry g_;
  const int32_t *crow_, *col_, *t_crow_, *t_row_, *t_perm_;
  ListCache *forward_cache_, *backward_cache_;
  py::object owners_;
};

void ChannelSums(Address sums, Address src, int64_t channels, int64_t count, int64_t threads) {
  const char* kernel = "channel_sums";
  RequireSize(kernel, "channels", channels);
  RequireSize(kernel, "count", count);
  RequirePointer(kernel, "sums", sums, channels);
  RequirePointer(kernel, "src", src, channels * count);
  RequireThreads(kernel, threads);
  dense_kernels().channel_sums(
      {Pointer<float>(sums), Pointer<const float>(src), channels, count, int(threads)});
}

}  // namespace

void bind_prepared(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PreparedProduct>(
      m, "PreparedProduct",
      "A layer's forward and backward products, its index arrays and geometry given once. `index`: "
      "addresses of crow, col, t_crow, t_row, t_perm, which must outlive every call; `geom` as for "
      "conv2d (of one pixel for linear), its batch not used; two ListCaches of these arrays.")
      .def(py::init<const std::vector<Address>&, const std::vector<int64_t>&, bool, int64_t,
                    int64_t, int64_t, py::object, py::object>(),
           py::arg("index"), py::arg("geom"), py::arg("linear"), py::arg("bh"), py::arg("bw"),
           py::arg("capacity"), py::arg("forward_lists"), py::arg("backward_lists"))
      .def("forward", &PreparedProduct::Forward, py::arg("y"), py::arg("x"), py::arg("values"),
           py::arg("bias"), py::arg("batch"), py::arg("threads"), Release(),
           "y = W x + bias (bias may be null); shapes as for linear and conv2d.")
      .def("backward", &PreparedProduct::Backward, py::arg("dx"), py::arg("dvalues"),
           py::arg("dbias"), py::arg("grad"), py::arg("x"), py::arg("values"), py::arg("batch"),
           py::arg("threads"), Release(), "The gradients whose address is not null.");
  m.def("channel_sums", &ChannelSums, py::arg("sums"), py::arg("src"), py::arg("channels"),
        py::arg("count"), py::arg("threads"), Release(),
        "sums[c] = the sum of src[c][:]; float32, the gradient of a bias.");
}

}  // namespace sk
