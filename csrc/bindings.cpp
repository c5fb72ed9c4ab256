// The Python module sparse_kernels._native: instruction sets, build information, layout. The other
// bindings are in bind_dense.cpp, bind_sparse.cpp and bind_cuda.cpp.
#include "bindings.h"

#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind_checks.h"
#include "build_config.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace sk {
namespace {

py::dict BuildInfo() {
  py::dict info;
  info["version"] = SK_VERSION;
  info["commit"] = SK_COMMIT;
  info["compiler"] = SK_COMPILER;
  info["isas"] = built_isas();
  info["openmp"] = SK_OPENMP_VERSION;
  info["cuda"] = SK_CUDA != 0;
  info["cuda_version"] = SK_CUDA_VERSION;
  info["cuda_architectures"] = SK_CUDA_ARCHITECTURES;
  info["why_no_cuda"] = SK_CUDA_WHY;
  return info;
}

// count x [rows][cols] -> [cols][..rows] with the given pitches; see TransposeArgs.
void Transpose(const char* kernel, TransposeArgs args, int64_t threads) {
  RequireSize(kernel, "batch, features, channels and pixels", std::min(args.rows, args.cols));
  RequireSize(kernel, "pixels", args.count);
  const int64_t elements = args.count * args.rows * args.cols;
  RequirePointer(kernel, "dst", reinterpret_cast<Address>(args.dst), elements);
  RequirePointer(kernel, "src", reinterpret_cast<Address>(args.src), elements);
  RequireThreads(kernel, threads);
  if (elements == 0) return;
  args.threads = static_cast<int>(threads);
  dense_kernels().transpose(args);
}

void ToFeatureMajor(Address dst, Address src, int64_t batch, int64_t features, int64_t threads) {
  Transpose("to_feature_major",
            {Pointer<float>(dst), Pointer<const float>(src), 1, batch, features, 0, features, 0,
             batch, 1},
            threads);
}

void FromFeatureMajor(Address dst, Address src, int64_t batch, int64_t features, int64_t threads) {
  Transpose("from_feature_major",
            {Pointer<float>(dst), Pointer<const float>(src), 1, features, batch, 0, batch, 0,
             features, 1},
            threads);
}

// One transposition of [batch][channels] per pixel.
void NhwcToFeatureMajor(Address dst, Address src, int64_t batch, int64_t channels, int64_t pixels,
                        int64_t threads) {
  Transpose("nhwc_to_feature_major",
            {Pointer<float>(dst), Pointer<const float>(src), pixels, batch, channels, channels,
             pixels * channels, batch, pixels * batch, 1},
            threads);
}

void NhwcFromFeatureMajor(Address dst, Address src, int64_t batch, int64_t channels, int64_t pixels,
                          int64_t threads) {
  Transpose("nhwc_from_feature_major",
            {Pointer<float>(dst), Pointer<const float>(src), pixels, channels, batch, batch,
             pixels * batch, channels, pixels * channels, 1},
            threads);
}

// The module cannot be imported with a forced instruction set that is not there: ImportError, whose
// __cause__ is the ValueError with the message (sparse_kernels/_load.py raises that one).
void ChooseIsaOrFailImport() {
  try {
    choose_isa();
  } catch (const std::invalid_argument& error) {
    py::set_error(PyExc_ValueError, error.what());
    throw py::error_already_set();
  }
}

void BindLayout(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("to_feature_major", &ToFeatureMajor, py::arg("dst"), py::arg("src"), py::arg("batch"),
        py::arg("features"), py::arg("threads"), Release(),
        "dst[f][n] = src[n][f]; float32, src contiguous [batch, features].");
  m.def("from_feature_major", &FromFeatureMajor, py::arg("dst"), py::arg("src"), py::arg("batch"),
        py::arg("features"), py::arg("threads"), Release(),
        "dst[n][f] = src[f][n]; float32, dst contiguous [batch, features].");
  m.def("nhwc_to_feature_major", &NhwcToFeatureMajor, py::arg("dst"), py::arg("src"),
        py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("threads"), Release(),
        "dst[c][p][n] = src[n][p][c]; float32, for sources in channels_last.");
  m.def("nhwc_from_feature_major", &NhwcFromFeatureMajor, py::arg("dst"), py::arg("src"),
        py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("threads"), Release(),
        "dst[n][p][c] = src[c][p][n]; float32.");
}

}  // namespace
}  // namespace sk

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of sparse_kernels. Addresses are integers, 0 is null; see csrc/*.h.";
  sk::ChooseIsaOrFailImport();
  m.def("isa", &sk::isa, "Name of the instruction set in use.");
  m.def("supported_isas", &sk::supported_isas,
        "Instruction sets that were built and that this machine can run, lowest first.");
  m.def(
      "set_isa", [](const std::string& name) { sk::set_isa(name, "set_isa"); }, py::arg("name"),
      "Use another instruction set from now on (tests). ValueError if there is none of that name.");
  m.def("build_info", &sk::BuildInfo, "How this module was built, as a dict.");
  m.def(
      "openmp_max_threads", [] { return omp_get_max_threads(); },
      "Threads of the OpenMP runtime that this module uses (shared with torch).");
  sk::BindLayout(m);
  sk::bind_dense(m);
  sk::bind_masked(m);
  sk::bind_sparse(m);
  sk::bind_wgrad(m);
  sk::bind_prepared(m);
  sk::bind_variants(m);
  sk::bind_cuda(m);
  sk::bind_cuda_dense(m);
  sk::bind_cuda_pattern(m);
  sk::bind_mma(m);
}
