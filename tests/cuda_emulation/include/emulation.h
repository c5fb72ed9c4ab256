// What the stand-in CUDA headers ask of the emulator (runtime/). See README.md.
//
// One OS thread runs everything. Each CUDA thread is a fiber; it runs until it waits for others: at
// a barrier, or where the lanes of a warp meet (shuffle, vote, __syncwarp, mma). Who runs next is
// drawn at random.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs; the scheduler sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;

// Where in the sources a collective was called; default arguments read it at the call.
struct Place {
  const char* file;
  int line;
};

// What a test may change: rows of thread blocks in a grid (SK_MAX_GRID_Y), and whether there is
// code for the device's architecture.
extern int max_grid_y;
extern bool compiled;

// Runs `body` once per thread of the grid. Returns false if a fault was found; last_fault() names
// it.
bool RunGrid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
const char* LastFault();

// Whether the code that runs is a kernel's, whose accesses are checked. The emulator's functions
// turn it off for themselves: their templates may be linked from the kernels' instrumented objects.
extern bool watching;
class Quiet {
 public:
  Quiet() : before_(watching) { watching = false; }
  ~Quiet() { watching = before_; }
  Quiet(const Quiet&) = delete;

 private:
  bool before_;
};

// Ends the launch from inside a thread, as a fault of it.
[[noreturn]] void Fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: every thread of the block, none of which may have returned.
void BlockBarrier(Place place);

// The lanes of `mask` meet: each brings an operand, the last one to arrive runs `resolve` over all
// of them (null for lanes outside the mask), then all go on.
using Resolve = void (*)(void* const* operands, uint32_t mask);
void WarpMeet(const char* what, uint32_t mask, Resolve resolve, void* operand, Place place);
// Of __syncwarp: the one meeting that also orders the lanes' accesses to memory.
inline void ResolveNothing(void* const*, uint32_t) {}
int LaneId();

// Shared memory of the running block: the dynamic part, and static parts by the address of a tag.
void* DynamicShared();
size_t DynamicSharedBytes();
void* StaticShared(const void* tag, size_t bytes, size_t alignment);
extern size_t shared_room;  // of the launch that runs: static and dynamic shared memory

// cp.async: the bytes arrive at the wait, not before; until then they read as a fault.
void CopyStart(void* shared, const void* global, size_t bytes, size_t source_bytes);
void CopyCommit();
void CopyWait(int groups_left);

// An access that instrumentation does not see or would misjudge (atomics, ldmatrix).
enum class Kind { kRead, kWrite, kAtomic };
void CheckAccess(const void* address, size_t bytes, Kind kind);
// A fault if the address is one of shared memory: __ldg reads global memory only.
void RequireGlobal(const void* address);
// Such an access to shared memory only.
void CheckShared(const void* address, size_t bytes, Kind kind);

}  // namespace emulation
