// Streams, events and captured graphs: when the work that launchers give is done, and where.
//
// As a rule work is done at once. While a test queues, each stream of each device has a queue; a
// synchronisation takes the next work of a queue drawn at random, so that nothing but a stream's
// own order and events decides what runs first. Work of two streams does not run at the same time.
// The default stream is one more queue: nothing waits for it, as for torch's streams.
#include "streams.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <stdexcept>
#include <utility>

#include "runtime.h"

struct EmulatedStream {
  int device;
};
struct EmulatedEvent {
  uint64_t recorded = 0, reached = 0;  // of its records: how many were queued, how many are passed
};

namespace emulation {

int executing_device = 0;

namespace {

struct Work {
  int device;
  std::function<bool()> run;
  std::function<bool()> ready;  // empty: at once
};
using Queue = std::pair<int, cudaStream_t>;  // a device and a stream of it

std::list<EmulatedStream> streams;
std::list<EmulatedEvent> events;
std::map<Queue, std::deque<Work>> queues;
bool queueing = false;
std::vector<Done> done;

cudaStream_t capturing = nullptr;
bool capture_broken = false;
std::vector<Work> captured;
std::vector<std::vector<Work>> graphs;

bool IsStream(cudaStream_t stream) {
  for (const EmulatedStream& known : streams)
    if (&known == stream) return true;
  return false;
}

int CurrentDevice() {
  int device = 0;
  (void)cudaGetDevice(&device);
  return device;
}

bool Do(const Work& work) {
  executing_device = work.device;
  return work.run();
}

// The next work of a queue drawn among those that can go on; false where nothing is queued.
bool Step(bool* fine) {
  std::vector<std::deque<Work>*> able;
  bool any = false;
  for (auto& entry : queues) {
    std::deque<Work>& queue = entry.second;
    any |= !queue.empty();
    if (!queue.empty() && (!queue.front().ready || queue.front().ready())) able.push_back(&queue);
  }
  if (!any) return false;
  if (able.empty()) throw std::logic_error("every stream waits for an event");
  std::deque<Work>& queue = *able[random_engine() % able.size()];
  const Work work = std::move(queue.front());
  queue.pop_front();
  *fine = Do(work);
  if (!*fine) DropWork();  // as after a fault on a GPU: nothing goes on
  return true;
}

cudaError_t Drain(const std::deque<Work>* queue) {
  bool fine = true;
  while (fine && (queue == nullptr || !queue->empty()) && Step(&fine)) {
  }
  return FinishLaunch(fine);
}

// What waits for a device or allocates has no place in a captured graph.
bool Refused(const char* what) {
  done.push_back({what, CurrentDevice(), nullptr});
  if (capturing != nullptr) capture_broken = true;
  return capturing != nullptr;
}

}  // namespace

cudaError_t Submit(const char* what, cudaStream_t stream, std::function<bool()> run,
                   std::function<bool()> ready) {
  const int device = CurrentDevice();
  if (stream != nullptr && (!IsStream(stream) || stream->device != device))
    return Remember(cudaErrorInvalidResourceHandle);
  done.push_back({what, device, stream});
  Work work = {device, std::move(run), std::move(ready)};
  if (capturing != nullptr && stream == nullptr) {
    capture_broken = true;
    return Remember(cudaErrorStreamCaptureImplicit);
  }
  if (capturing != nullptr && stream == capturing)
    captured.push_back(std::move(work));
  else if (queueing)
    queues[{device, stream}].push_back(std::move(work));
  else
    return FinishLaunch(Do(work));
  return cudaSuccess;
}

cudaStream_t NewStream(int device) {
  if (device < 0 || device >= kEmulatedDevices) throw std::invalid_argument("no such device");
  streams.push_back({device});
  return &streams.back();
}

cudaEvent_t NewEvent() {
  events.emplace_back();
  return &events.back();
}

void SetQueueing(bool on) {
  for (const auto& entry : queues)
    if (!entry.second.empty())
      throw std::logic_error("expected no work in the queues: synchronize first");
  queueing = on;
}

void DropWork() { queues.clear(); }

std::vector<Done> TakeDone() { return std::exchange(done, {}); }

void BeginCapture(cudaStream_t stream) {
  if (stream == nullptr || !IsStream(stream) || capturing != nullptr)
    throw std::invalid_argument("capture: expected a stream, and no capture under way");
  capturing = stream;
  capture_broken = false;
  captured.clear();
}

size_t EndCapture() {
  if (std::exchange(capturing, nullptr) == nullptr) throw std::logic_error("no capture under way");
  if (capture_broken) throw std::runtime_error("the capture was broken: a call that it forbids");
  graphs.push_back(std::move(captured));
  return graphs.size() - 1;
}

cudaError_t Replay(size_t graph) {
  bool fine = true;
  for (const Work& work : graphs.at(graph)) fine = fine && Do(work);
  return FinishLaunch(fine);
}

}  // namespace emulation

using emulation::Kind;

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulation::Refused("synchronize"))
    return emulation::Remember(cudaErrorStreamCaptureUnsupported);
  const int device = stream == nullptr ? emulation::CurrentDevice() : stream->device;
  const auto found = emulation::queues.find({device, stream});
  return found == emulation::queues.end() ? cudaSuccess : emulation::Drain(&found->second);
}

cudaError_t cudaDeviceSynchronize() {
  if (emulation::Refused("synchronize"))
    return emulation::Remember(cudaErrorStreamCaptureUnsupported);
  const cudaError_t status = emulation::Drain(nullptr);
  emulation::DropWork();
  return status;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const uint64_t ticket = ++event->recorded;
  return emulation::Submit("event", stream, [=] {
    event->reached = ticket;
    return true;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const uint64_t ticket = event->recorded;
  return emulation::Submit(
      "wait", stream, [] { return true; }, [=] { return event->reached >= ticket; });
}

// Moves of the driver's own are checked as a kernel of one thread.
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return emulation::Submit("memset", stream, [=] {
    return emulation::RunGrid(dim3(1), dim3(1), 0, [=] {
      if (bytes > 0) emulation::CheckAccess(memory, bytes, Kind::kWrite);
      std::memset(memory, value, bytes);
    });
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return emulation::Submit("copy", stream, [=] {
    return emulation::RunGrid(dim3(1), dim3(1), 0, [=] {
      if (bytes > 0) emulation::CheckAccess(from, bytes, Kind::kRead);
      if (bytes > 0) emulation::CheckAccess(to, bytes, Kind::kWrite);
      std::memcpy(to, from, bytes);
    });
  });
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (emulation::Refused("malloc")) return emulation::Remember(cudaErrorStreamCaptureUnsupported);
  *memory = std::malloc(bytes);
  emulation::RegisterMemory(*memory, bytes, true, "memory of cudaMalloc",
                            emulation::CurrentDevice());
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (emulation::Refused("free")) return emulation::Remember(cudaErrorStreamCaptureUnsupported);
  emulation::UnregisterMemory(memory);
  std::free(memory);
  return cudaSuccess;
}
