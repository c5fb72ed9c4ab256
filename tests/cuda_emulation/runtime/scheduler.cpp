// Runs a grid: blocks one after another in random order, the threads of a block as fibers.
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Saves what the System V ABI asks a callee to keep, and returns on the other stack.
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

namespace emulation {

Thread* running = nullptr;
bool watching = false;
uint64_t block_phase = 0;
Counters counters = {};
uint64_t seed = 0;
std::mt19937_64 random_engine;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr unsigned kMaxThreads = 1024;

Fiber scheduler;
std::vector<std::unique_ptr<Thread>> threads;  // reused from block to block
unsigned thread_count = 0;
const std::function<void()>* body = nullptr;
std::string fault;
sigjmp_buf on_signal;

void ThreadMain() {
  EnterFiber(scheduler);
  (*body)();
  running->state = Thread::kDone;
  CheckCopiesDone(*running);
  SwitchFiber(running->fiber, scheduler);
  std::abort();  // a finished thread is never resumed
}

void Wait() {
  Thread* self = running;
  SwitchFiber(self->fiber, scheduler);
}

std::string Describe(const Thread& t) {
  return "thread (" + std::to_string(t.index.x) + ", " + std::to_string(t.index.y) + ", " +
         std::to_string(t.index.z) + ")";
}

void SetFault(const std::string& what, const Thread* thread) {
  if (!fault.empty()) return;
  fault = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
          std::to_string(blockIdx.z) + ")";
  if (thread != nullptr) fault += " " + Describe(*thread);
  fault += ": " + what + " [seed " + std::to_string(seed) + "]";
}

void OnSignal(int signal) {
  const char* name = signal == SIGSEGV || signal == SIGBUS ? "access to memory that is not mapped"
                     : signal == SIGFPE                    ? "integer division by zero"
                                                           : "illegal instruction";
  watching = false;
  SetFault(name, running);
  siglongjmp(on_signal, signal);
}

// Faulting accesses become faults of the thread. Under ASan its own report is better.
class SignalGuard {
 public:
  SignalGuard() {
#if !defined(__SANITIZE_ADDRESS__)
    static char stack[64 << 10];
    const stack_t alternate = {stack, 0, sizeof stack};
    sigaltstack(&alternate, &before_stack_);
    struct sigaction action = {};
    action.sa_handler = OnSignal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
#endif
  }
  ~SignalGuard() {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&before_stack_, nullptr);
#endif
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction before_[4];
  stack_t before_stack_;
};

void Prepare(dim3 block) {
  thread_count = block.x * block.y * block.z;
  while (threads.size() < thread_count) {
    auto thread = std::make_unique<Thread>();
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);  // an overflow is a fault, not a neighbour's stack
    thread->fiber.stack = static_cast<char*>(stack);
    thread->fiber.stack_bytes = kStackBytes;
    threads.push_back(std::move(thread));
  }
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& t = *threads[i];
    t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t.number = static_cast<int>(i);
    t.state = Thread::kReady;
    t.warp_phase = 0;
    t.open.clear();
    t.groups.clear();
    t.committed = false;
    PrepareFiber(t.fiber, ThreadMain);
  }
}

// A thread that waits turned `watching` off, and turns it on when it goes on.
void Resume(Thread& t) {
  threadIdx = t.index;
  running = &t;
  SwitchFiber(scheduler, t.fiber);
  running = nullptr;
  watching = false;
}

// Runs the ready lanes of one warp in random order; returns whether there were any.
bool RunWarp(unsigned warp) {
  const unsigned first = warp * kWarp, count = std::min<unsigned>(kWarp, thread_count - first);
  unsigned order[kWarp];
  for (unsigned i = 0; i < count; ++i) order[i] = first + i;
  std::shuffle(order, order + count, random_engine);
  bool any = false;
  for (unsigned i = 0; i < count && fault.empty(); ++i) {
    if (threads[order[i]]->state != Thread::kReady) continue;
    any = true;
    Resume(*threads[order[i]]);
  }
  return any;
}

// All of the block stand at one barrier: they may go on.
bool PassBarrier() {
  const Thread& first = *threads[0];
  for (unsigned i = 0; i < thread_count; ++i) {
    const Thread& t = *threads[i];
    if (t.state != Thread::kAtBarrier) return false;
    if (t.place.line != first.place.line || t.place.file != first.place.file) {
      SetFault("__syncthreads in divergent code: line " + std::to_string(t.place.line) +
                   " here, line " + std::to_string(first.place.line) + " in " + Describe(first),
               &t);
      return false;
    }
  }
  for (unsigned i = 0; i < thread_count; ++i) threads[i]->state = Thread::kReady;
  ++block_phase;
  ++counters.barriers;
  return true;
}

// Nobody can run: names who waits for what. Returns false if all have finished.
bool ReportStuck() {
  const Thread* waiting = nullptr;
  unsigned done = 0, at_barrier = 0, at_warp = 0;
  for (unsigned i = 0; i < thread_count; ++i) {
    const Thread& t = *threads[i];
    done += t.state == Thread::kDone;
    at_barrier += t.state == Thread::kAtBarrier;
    at_warp += t.state == Thread::kAtWarp;
    // A lane that waits for its warp says more than those that wait for it at a barrier.
    if (t.state == Thread::kAtWarp && (waiting == nullptr || waiting->state != t.state))
      waiting = &t;
    if (t.state == Thread::kAtBarrier && waiting == nullptr) waiting = &t;
  }
  if (done == thread_count) return false;
  const std::string what = waiting->state == Thread::kAtBarrier ? "__syncthreads" : waiting->what;
  SetFault(what + " at line " + std::to_string(waiting->place.line) +
               " is not reached by all its threads: of the block's " +
               std::to_string(thread_count) + " threads " + std::to_string(done) + " returned, " +
               std::to_string(at_barrier) + " wait at __syncthreads, " + std::to_string(at_warp) +
               " for lanes of their warp",
           waiting);
  return true;
}

void RunBlock(dim3 block, size_t shared_bytes) {
  Prepare(block);
  BeginSharedOf(shared_bytes);
  block_phase = 0;
  std::vector<unsigned> warps((thread_count + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  while (fault.empty()) {
    std::shuffle(warps.begin(), warps.end(), random_engine);
    bool any = false;
    // A random part of the warps only: the others fall behind.
    const size_t part = 1 + random_engine() % warps.size();
    for (size_t i = 0; i < part && fault.empty(); ++i) any |= RunWarp(warps[i]);
    if (any || !fault.empty()) continue;
    for (size_t i = part; i < warps.size() && fault.empty(); ++i) any |= RunWarp(warps[i]);
    if (any || !fault.empty() || PassBarrier()) continue;
    if (!fault.empty() || !ReportStuck()) break;
  }
  EndShared();
}

}  // namespace

bool InAnyStack(const void* address) {
  for (unsigned i = 0; i < thread_count; ++i)
    if (threads[i]->fiber.Holds(address)) return true;
  return false;
}

const char* LastFault() { return fault.c_str(); }

void Fault(const char* format, ...) {
  watching = false;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  SetFault(text, running);
  if (running == nullptr) throw std::runtime_error(fault);
  Wait();
  std::abort();  // the scheduler does not resume a thread after a fault
}

int LaneId() { return running->number % kWarp; }

void BlockBarrier(Place place) {
  Quiet quiet;
  running->place = place;
  running->state = Thread::kAtBarrier;
  Wait();
}

// Operands of the lanes of `self`'s mask; false as long as one of them is still to come.
bool GatherOperands(const Thread& self, void** operands) {
  const int first = self.number - LaneId();
  bool complete = true;
  for (int i = 0; i < kWarp; ++i) {
    if (!(self.mask >> i & 1)) continue;
    const unsigned number = static_cast<unsigned>(first + i);
    if (number >= thread_count || threads[number]->state == Thread::kDone)
      Fault("%s at line %d: lane %d of the mask %08x %s", self.what, self.place.line, i, self.mask,
            number >= thread_count ? "does not exist" : "has returned");
    const Thread& other = *threads[number];
    if (other.state != Thread::kAtWarp) {
      complete = false;
      continue;
    }
    if (other.mask != self.mask || other.resolve != self.resolve)
      Fault("%s with mask %08x at line %d meets %s with mask %08x at line %d of lane %d", self.what,
            self.mask, self.place.line, other.what, other.mask, other.place.line, i);
    operands[i] = other.operand;
  }
  return complete;
}

void WarpMeet(const char* what, uint32_t mask, Resolve resolve, void* operand, Place place) {
  Quiet quiet;
  Thread* self = running;
  const int lane = LaneId(), first = self->number - lane;
  if (!(mask >> lane & 1)) Fault("%s: lane %d is not in its own mask %08x", what, lane, mask);
  self->what = what;
  self->mask = mask;
  self->resolve = resolve;
  self->operand = operand;
  self->place = place;
  self->state = Thread::kAtWarp;
  void* operands[kWarp] = {};
  if (!GatherOperands(*self, operands)) return Wait();
  resolve(operands, mask);
  ++counters.collectives;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = *threads[first + i];
    other.state = Thread::kReady;
    other.warp_phase += resolve == ResolveNothing;
  }
  // All lanes go on in a new random order, this one included.
  Wait();
}

bool RunGrid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  fault.clear();
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  ++counters.launches;
  counters.blocks += blocks;
  counters.threads += blocks * block.x * block.y * block.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_engine);
  SignalGuard guard;
  if (sigsetjmp(on_signal, 1) == 0) {
    for (size_t i = 0; i < order.size() && fault.empty(); ++i) {
      const uint64_t b = order[i];
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      RunBlock(block, shared_bytes);
    }
  } else {
    EndShared();
  }
  running = nullptr;
  body = nullptr;
  return fault.empty();
}

}  // namespace emulation
