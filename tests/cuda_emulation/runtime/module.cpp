// The Python module: the project's own bindings of the CUDA kernels, built against the emulator,
// the kernels of selftest.cu, and the emulator's controls.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "cuda_runtime_api.h"
#include "runtime.h"

namespace py = pybind11;

void bind_selftest(py::module_& m);
void bind_selftest_mma(py::module_& m);

PYBIND11_MODULE(SK_EMULATION_MODULE, m) {
  sk::bind_cuda(m);
  sk::bind_cuda_dense(m);
  sk::bind_cuda_pattern(m);
  sk::bind_mma(m);
  bind_selftest(m);
  bind_selftest_mma(m);
  m.def("register_memory",
        [](std::uintptr_t begin, size_t bytes, bool writable, const std::string& name) {
          emulation::RegisterMemory(reinterpret_cast<const void*>(begin), bytes, writable, name);
        });
  m.def("forget_memory", &emulation::ForgetMemory);
  m.def("current_device", [] {
    int device = -1;
    cudaGetDevice(&device);
    return device;
  });
  m.def("set_max_grid_y", [](int rows) { emulation::max_grid_y = rows; });
  m.def("set_compiled", [](bool compiled) { emulation::compiled = compiled; });
  m.def("set_strict", &emulation::SetStrict);
  m.def("set_seed", [](uint64_t seed) {
    emulation::seed = seed;
    emulation::random_engine.seed(seed);
  });
  m.def("counters", [] {
    const emulation::Counters c = emulation::counters;
    py::dict found;
    found["launches"] = c.launches;
    found["blocks"] = c.blocks;
    found["threads"] = c.threads;
    found["accesses"] = c.accesses;
    found["barriers"] = c.barriers;
    found["collectives"] = c.collectives;
    found["copies"] = c.copies;
    return found;
  });
}
