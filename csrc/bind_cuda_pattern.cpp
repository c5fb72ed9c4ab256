// Bindings of the pattern change on a GPU. Without CUDA in the build the functions say why not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_checks.h"
#include "bindings.h"
#include "build_config.h"
#include "kernels_cuda_pattern.h"

namespace py = pybind11;

namespace sk {
namespace {

// Layers as Python lists them: the members of the struct in order, one integer each.
using Words = std::vector<int64_t>;

#if SK_CUDA

template <typename Layer>
std::vector<Layer> LayersOf(const char* kernel, const Words& words) {
  constexpr size_t kMembers = sizeof(Layer) / sizeof(int64_t);
  static_assert(sizeof(Layer) % sizeof(int64_t) == 0, "members of 8 bytes each");
  if (words.size() % kMembers != 0)
    Refuse(std::string(kernel) + ": layers must be described by " + std::to_string(kMembers) +
           " integers each, got " + std::to_string(words.size()) + " in all");
  std::vector<Layer> layers(words.size() / kMembers);
  if (!words.empty())
    std::memcpy(static_cast<void*>(layers.data()), words.data(), words.size() * sizeof(int64_t));
  return layers;
}

cuda::Score ScoreOf(const char* kernel, int64_t bytes) {
  if (bytes != 4 && bytes != 8)
    Refuse(std::string(kernel) + ": score_bytes must be 4 (float32) or 8 (float64), got " +
           std::to_string(bytes));
  return bytes == 4 ? cuda::Score::kFloat32 : cuda::Score::kFloat64;
}

cuda::Place PatternPlace(const char* kernel, int64_t device, Address stream) {
  RequireSize(kernel, "device", device);
  return {static_cast<int>(device), Pointer<void>(stream)};
}

#define SK_SCRATCH \
  cuda::Scratch { Pointer<void>(workspace), workspace_bytes }

int64_t SelectTopK(const Words& words, bool largest, int64_t score_bytes, Address workspace,
                   int64_t workspace_bytes, int64_t device, Address stream) {
  return cuda::select_top_k(LayersOf<cuda::SelectLayer>("select_top_k", words), largest,
                            ScoreOf("select_top_k", score_bytes), SK_SCRATCH,
                            PatternPlace("select_top_k", device, stream));
}
int64_t KeepBlocks(const Words& words, int64_t score_bytes, Address workspace,
                   int64_t workspace_bytes, int64_t device, Address stream) {
  return cuda::keep_blocks(LayersOf<cuda::KeepLayer>("keep_blocks", words),
                           ScoreOf("keep_blocks", score_bytes), SK_SCRATCH,
                           PatternPlace("keep_blocks", device, stream));
}
int64_t MergeKeys(const Words& words, Address workspace, int64_t workspace_bytes, int64_t device,
                  Address stream) {
  return cuda::merge_keys(LayersOf<cuda::MergeLayer>("merge_keys", words), SK_SCRATCH,
                          PatternPlace("merge_keys", device, stream));
}
int64_t BuildIndex(const Words& words, Address workspace, int64_t workspace_bytes, int64_t device,
                   Address stream) {
  return cuda::build_index(LayersOf<cuda::IndexLayer>("build_index", words), SK_SCRATCH,
                           PatternPlace("build_index", device, stream));
}
int64_t LocateBlocks(const Words& words, Address workspace, int64_t workspace_bytes, int64_t device,
                     Address stream) {
  return cuda::locate_blocks(LayersOf<cuda::LocateLayer>("locate_blocks", words), SK_SCRATCH,
                             PatternPlace("locate_blocks", device, stream));
}
int64_t MoveBlocks(const Words& words, Address workspace, int64_t workspace_bytes, int64_t device,
                   Address stream) {
  return cuda::move_blocks(LayersOf<cuda::MoveTensor>("move_blocks", words), SK_SCRATCH,
                           PatternPlace("move_blocks", device, stream));
}

#else

[[noreturn]] int64_t Absent(const char* kernel) {
  throw std::runtime_error(std::string(kernel) + ": this build has no CUDA kernels (" +
                           SK_CUDA_WHY +
                           "); reinstall with nvcc on PATH and SPARSE_KERNELS_CUDA=ON");
}
int64_t SelectTopK(const Words&, bool, int64_t, Address, int64_t, int64_t, Address) {
  Absent("select_top_k");
}
int64_t KeepBlocks(const Words&, int64_t, Address, int64_t, int64_t, Address) {
  Absent("keep_blocks");
}
int64_t MergeKeys(const Words&, Address, int64_t, int64_t, Address) { Absent("merge_keys"); }
int64_t BuildIndex(const Words&, Address, int64_t, int64_t, Address) { Absent("build_index"); }
int64_t LocateBlocks(const Words&, Address, int64_t, int64_t, Address) { Absent("locate_blocks"); }
int64_t MoveBlocks(const Words&, Address, int64_t, int64_t, Address) { Absent("move_blocks"); }

#endif

}  // namespace

void bind_cuda_pattern(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("cuda_select_top_k", &SelectTopK, py::arg("layers"), py::arg("largest"),
        py::arg("score_bytes"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"),
        py::arg("stream"), Release(),
        "Exact selection in every layer, see kernels_cuda_pattern.h, as all functions of this "
        "family: with workspace 0 nothing is done. Returns the bytes of workspace wanted.");
  m.def("cuda_keep_blocks", &KeepBlocks, py::arg("layers"), py::arg("score_bytes"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"),
        Release(), "The keys of the blocks that stay; -1 in the scores at them.");
  const auto define = [&m](const char* name, auto function, const char* text) {
    m.def(name, function, py::arg("layers"), py::arg("workspace"), py::arg("workspace_bytes"),
          py::arg("device"), py::arg("stream"), Release(), text);
  };
  define("cuda_merge_keys", &MergeKeys, "One increasing key list of two, per layer.");
  define("cuda_build_index", &BuildIndex, "The five index arrays of every layer from its keys.");
  define("cuda_locate_blocks", &LocateBlocks, "Where the new blocks were in the old order.");
  define("cuda_move_blocks", &MoveBlocks, "Tensors of blocks into the new order.");
}

}  // namespace sk
