// Memory as the kernels see it: registered global memory, shared memory, copies under way.
//
// Every access of a kernel comes through CheckAccess (hooks.cpp). Of each byte of shared memory a
// shadow says who wrote and read it last, and when, in barriers and in meetings of the warp. Two
// threads that touch a byte with no barrier between them, one of them writing, are a fault, in
// whatever order they happened to run.
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "runtime.h"

extern "C" char __ehdr_start, _end;  // of this shared object: its constants and globals

namespace emulation {
namespace {

struct Visit {
  int thread = -1;
  uint64_t phase = 0, warp_phase = 0;
};
struct Shadow {
  Visit write, read;
  int other_reader = -1;  // a second reader since the last write, of another warp than the first
  bool written = false;   // 0xFF until then
  bool pending = false;   // a cp.async is under way
};
// Room on both sides of shared memory: what falls into it was meant for shared memory, and missed.
// None under ASan, whose red zones start at the last byte. There plain loads and stores are not
// seen here either (hooks.cpp), so that the shadow knows of unfinished copies only.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kMargin = 0;
constexpr bool kSeesEveryAccess = false;
#else
constexpr size_t kMargin = 1024;
constexpr bool kSeesEveryAccess = true;
#endif

struct Region {
  char* begin = nullptr;
  void* block = nullptr;  // of the heap, what to free
  size_t bytes = 0;
  std::vector<Shadow> shadow;
  bool Holds(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return begin != nullptr && byte >= begin - kMargin && byte < begin + bytes + kMargin;
  }
};

std::map<const char*, Allocation> allocations;  // by begin
const Allocation* last_hit = nullptr;
bool strict_memory = true;
Region dynamic;
std::map<const void*, Region> statics;

// `offset`: how far past a multiple of 128 bytes it begins.
Region NewRegion(size_t bytes, size_t offset) {
  Region region;
  region.bytes = bytes;
  if (posix_memalign(&region.block, 128, 2 * kMargin + offset + bytes + (bytes == 0)) != 0)
    throw std::bad_alloc();
  region.begin = static_cast<char*>(region.block) + kMargin + offset;
  std::memset(region.begin, 0xff, bytes);
  region.shadow.resize(bytes);
  return region;
}

// Was `then` before what `running` does now, for certain?
bool Ordered(const Visit& then) {
  if (then.thread < 0 || then.phase < block_phase || then.thread == running->number) return true;
  return then.thread / kWarp == running->number / kWarp && then.warp_phase < running->warp_phase;
}

void Touch(Region& region, size_t at, Kind kind) {
  Shadow& s = region.shadow[at];
  const Visit now = {running->number, block_phase, running->warp_phase};
  if (s.pending)
    Fault("shared memory byte %zu: %s while a cp.async into it is under way (not waited for)", at,
          kind == Kind::kWrite ? "written" : "read");
  if (!kSeesEveryAccess) return;
  if (kind == Kind::kRead && !s.written)
    Fault("shared memory byte %zu: read before anything was written", at);
  if (!Ordered(s.write) && kind != Kind::kAtomic)
    Fault("shared memory byte %zu: %s, but thread %d wrote it with no barrier in between", at,
          kind == Kind::kWrite ? "written" : "read", s.write.thread);
  if (kind == Kind::kRead) {
    if (!Ordered(s.read) && s.read.thread / kWarp != now.thread / kWarp)
      s.other_reader = s.read.thread;
    s.read = now;
    return;
  }
  if (kind == Kind::kWrite) {
    if (!Ordered(s.read))
      Fault("shared memory byte %zu: written, but thread %d read it with no barrier in between", at,
            s.read.thread);
    if (s.other_reader >= 0 && s.read.phase == block_phase)
      Fault("shared memory byte %zu: written, but thread %d read it with no barrier in between", at,
            s.other_reader);
  }
  s.other_reader = -1;
  s.write = kind == Kind::kAtomic ? Visit{} : now;
  s.written = true;
}

void CheckRegion(Region& region, const char* address, size_t bytes, Kind kind) {
  const ptrdiff_t at = address - region.begin;
  if (at < 0 || static_cast<size_t>(at) + bytes > region.bytes)
    Fault("shared memory: %zu bytes at byte %td, of %zu that there are", bytes, at, region.bytes);
  for (size_t i = 0; i < bytes; ++i) Touch(region, static_cast<size_t>(at) + i, kind);
}

Region* FindShared(const void* address) {
  if (dynamic.Holds(address)) return &dynamic;
  for (auto& entry : statics)
    if (entry.second.Holds(address)) return &entry.second;
  return nullptr;
}

const Allocation* FindAllocation(const char* address) {
  if (last_hit != nullptr && address >= last_hit->begin &&
      address < last_hit->begin + last_hit->bytes)
    return last_hit;
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const Allocation& candidate = std::prev(after)->second;
  // A little past the end still belongs to it: the message then says by how much.
  if (address >= candidate.begin + candidate.bytes + 4096) return nullptr;
  return last_hit = &candidate;
}

void CheckGlobal(const char* address, size_t bytes, Kind kind) {
  const Allocation* found = FindAllocation(address);
  const char* verb = kind == Kind::kRead ? "read" : "write";
  if (found == nullptr) {
    const bool below = allocations.lower_bound(address) != allocations.end() &&
                       allocations.lower_bound(address)->first - address < 4096;
    if (strict_memory || below)
      Fault("%s of %zu bytes at %p, which no allocation holds%s%s", verb, bytes, address,
            below ? "; next is " : "",
            below ? allocations.lower_bound(address)->second.name.c_str() : "");
    return;
  }
  const size_t at = static_cast<size_t>(address - found->begin);
  if (at + bytes > found->bytes)
    Fault("%s of %zu bytes at byte %zu of %s, which has %zu", verb, bytes, at, found->name.c_str(),
          found->bytes);
  if (found->device >= 0 && found->device != executing_device)
    Fault("%s of %zu bytes of %s, memory of device %d, on device %d", verb, bytes,
          found->name.c_str(), found->device, executing_device);
  if (kind != Kind::kRead && !found->writable)
    Fault("write of %zu bytes at byte %zu of %s, which is an input", bytes, at,
          found->name.c_str());
}

void Finish(const Copy& copy) {
  Region* region = FindShared(copy.shared);
  const size_t at = static_cast<size_t>(copy.shared - region->begin);
  for (size_t i = 0; i < copy.bytes; ++i) {
    region->shadow[at + i].pending = false;
    Touch(*region, at + i, Kind::kWrite);
    copy.shared[i] = i < copy.source_bytes ? copy.global[i] : 0;
  }
}

}  // namespace

void RegisterMemory(const void* begin, size_t bytes, bool writable, const std::string& name,
                    int device) {
  const char* first = static_cast<const char*>(begin);
  allocations[first] = {first, bytes, writable, name, device};
  last_hit = nullptr;
}

void UnregisterMemory(const void* begin) {
  allocations.erase(static_cast<const char*>(begin));
  last_hit = nullptr;
}

void ForgetMemory() {
  allocations.clear();
  last_hit = nullptr;
}

void SetStrict(bool strict) { strict_memory = strict; }

void CheckAccess(const void* address, size_t bytes, Kind kind) {
  Quiet quiet;
  if (running == nullptr || running->fiber.Holds(address)) return;
  ++counters.accesses;
  const char* byte = static_cast<const char*>(address);
  if (Region* region = FindShared(address)) return CheckRegion(*region, byte, bytes, kind);
  if (byte >= &__ehdr_start && byte < &_end) return;
  if (InAnyStack(address)) Fault("access to %zu bytes of another thread's local memory", bytes);
  CheckGlobal(byte, bytes, kind);
}

void CheckShared(const void* address, size_t bytes, Kind kind) {
  Quiet quiet;
  Region* region = FindShared(address);
  if (region == nullptr) Fault("expected an address of shared memory, got %p", address);
  CheckRegion(*region, static_cast<const char*>(address), bytes, kind);
}

void RequireGlobal(const void* address) {
  Quiet quiet;
  if (FindShared(address) != nullptr) Fault("__ldg of shared memory");
}

void BeginSharedOf(size_t dynamic_bytes) { dynamic = NewRegion(dynamic_bytes, 0); }

void EndShared() {
  std::free(dynamic.block);
  dynamic = Region();
  for (auto& entry : statics) std::free(entry.second.block);
  statics.clear();
}

void* DynamicShared() { return dynamic.begin; }
size_t DynamicSharedBytes() { return dynamic.bytes; }

size_t shared_room = 48 << 10;

// Aligned as its type says and no better: what a kernel needs beyond that, it must ask for.
void* StaticShared(const void* tag, size_t bytes, size_t alignment) {
  Quiet quiet;
  auto found = statics.find(tag);
  if (found != statics.end()) return found->second.begin;
  size_t total = dynamic.bytes + bytes;
  for (const auto& entry : statics) total += entry.second.bytes;
  if (total > shared_room)
    Fault("%zu bytes of static and dynamic shared memory, %zu are allowed here", total,
          shared_room);
  return statics.emplace(tag, NewRegion(bytes, alignment % 128)).first->second.begin;
}

void CopyStart(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  Quiet quiet;
  if (bytes != 4 && bytes != 8 && bytes != 16)
    Fault("cp.async moves 4, 8 or 16 bytes, not %zu", bytes);
  if (source_bytes > bytes) Fault("cp.async of %zu bytes from %zu", bytes, source_bytes);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    Fault("cp.async of %zu bytes from %p to %p is misaligned", bytes, global, shared);
  if (source_bytes > 0) CheckAccess(global, source_bytes, Kind::kRead);
  CheckShared(shared, bytes, Kind::kWrite);
  Region* region = FindShared(shared);
  char* to = static_cast<char*>(shared);
  std::memset(to, 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i)
    region->shadow[static_cast<size_t>(to - region->begin) + i].pending = true;
  running->open.push_back({to, static_cast<const char*>(global), bytes, source_bytes});
  ++counters.copies;
}

void CopyCommit() {
  Quiet quiet;
  running->groups.push_back(std::move(running->open));
  running->open.clear();
  running->committed = true;
}

void CopyWait(int groups_left) {
  Quiet quiet;
  if (!running->committed) Fault("cp.async wait with no group committed before it");
  while (running->groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : running->groups.front()) Finish(copy);
    running->groups.pop_front();
  }
}

void CheckCopiesDone(const Thread& thread) {
  size_t left = thread.open.size();
  for (const auto& group : thread.groups) left += group.size();
  if (left > 0) Fault("returns while %zu cp.async copies are not waited for", left);
}

}  // namespace emulation
