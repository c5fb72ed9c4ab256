// The Python module: the project's own bindings of the CUDA kernels, built against the emulator,
// the kernels of selftest.cu, and the emulator's controls.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda_runtime_api.h"
#include "runtime.h"
#include "streams.h"

namespace py = pybind11;

void bind_selftest(py::module_& m);
void bind_selftest_mma(py::module_& m);

namespace {

// RuntimeError with the fault, where a launch failed.
void Raise(const char* what, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

cudaStream_t StreamAt(std::uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

void BindStreams(py::module_& m) {
  m.def("new_stream",
        [](int device) { return reinterpret_cast<std::uintptr_t>(emulation::NewStream(device)); });
  m.def("new_event", [] { return reinterpret_cast<std::uintptr_t>(emulation::NewEvent()); });
  m.def("record_event", [](std::uintptr_t event, std::uintptr_t stream) {
    Raise("cudaEventRecord",
          cudaEventRecord(reinterpret_cast<cudaEvent_t>(event), StreamAt(stream)));
  });
  m.def("wait_event", [](std::uintptr_t stream, std::uintptr_t event) {
    Raise("cudaStreamWaitEvent",
          cudaStreamWaitEvent(StreamAt(stream), reinterpret_cast<cudaEvent_t>(event)));
  });
  m.def("set_queueing", &emulation::SetQueueing);
  m.def("drop_work", &emulation::DropWork);
  m.def("synchronize", [] { Raise("cudaDeviceSynchronize", cudaDeviceSynchronize()); });
  m.def("synchronize_stream", [](std::uintptr_t stream) {
    Raise("cudaStreamSynchronize", cudaStreamSynchronize(StreamAt(stream)));
  });
  m.def("begin_capture", [](std::uintptr_t stream) { emulation::BeginCapture(StreamAt(stream)); });
  m.def("end_capture", &emulation::EndCapture);
  m.def("replay", [](size_t graph) { Raise("cudaGraphLaunch", emulation::Replay(graph)); });
  m.def("take_done", [] {
    py::list found;
    for (const emulation::Done& call : emulation::TakeDone())
      found.append(
          py::make_tuple(call.what, call.device, reinterpret_cast<std::uintptr_t>(call.stream)));
    return found;
  });
}

}  // namespace

PYBIND11_MODULE(SK_EMULATION_MODULE, m) {
  BindStreams(m);
  sk::bind_cuda(m);
  sk::bind_cuda_dense(m);
  sk::bind_cuda_pattern(m);
  sk::bind_mma(m);
  bind_selftest(m);
  bind_selftest_mma(m);
  m.def(
      "register_memory",
      [](std::uintptr_t begin, size_t bytes, bool writable, const std::string& name, int device) {
        emulation::RegisterMemory(reinterpret_cast<const void*>(begin), bytes, writable, name,
                                  device);
      },
      py::arg("begin"), py::arg("bytes"), py::arg("writable"), py::arg("name"),
      py::arg("device") = -1);
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
