// What the parts of the emulator know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "emulation.h"
#include "fiber.h"

namespace emulation {

// One cp.async under way.
struct Copy {
  char* shared;
  const char* global;
  size_t bytes, source_bytes;  // the rest is filled with zeros
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number;  // within the block; warp = number / 32
  enum State { kReady, kAtBarrier, kAtWarp, kDone } state;
  Place place;  // where it waits
  // At a warp collective.
  const char* what;
  uint32_t mask;
  Resolve resolve;
  void* operand;
  uint64_t warp_phase;  // how many __syncwarp of its warp it has passed
  // cp.async
  std::vector<Copy> open;                // not committed
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  bool committed;
};

struct Counters {
  uint64_t launches, blocks, threads, accesses, barriers, collectives, copies;
};

extern Thread* running;       // null outside kernels: then no access is checked
extern uint64_t block_phase;  // how many barriers the running block has passed
extern Counters counters;
extern std::mt19937_64 random_engine;
extern uint64_t seed;

// memory.cpp
void BeginSharedOf(size_t dynamic_bytes);  // a new block: fresh shared memory, all 0xFF
void EndShared();
void CheckCopiesDone(const Thread& thread);
bool InAnyStack(const void* address);  // scheduler.cpp

struct Allocation {
  const char* begin;
  size_t bytes;
  bool writable;
  std::string name;
  int device;  // -1: of any
};
void RegisterMemory(const void* begin, size_t bytes, bool writable, const std::string& name,
                    int device = -1);
void UnregisterMemory(const void* begin);
void ForgetMemory();
void SetStrict(bool strict);

cudaError_t Remember(cudaError_t status);  // api.cpp: for cudaGetLastError
cudaError_t FinishLaunch(bool fine);
extern int executing_device;  // streams.cpp: of the work that runs

}  // namespace emulation
