// Fibers: a stack each, switched by hand on x86-64 (ucontext makes a system call per switch, and a
// warp switches 32 times per shuffle), by ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

struct Fiber {
  char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#if defined(__x86_64__)
  void* pointer = nullptr;  // saved stack pointer
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
  bool Holds(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return byte >= stack && byte < stack + stack_bytes;
  }
};

#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
#endif

// `entry` never returns: it leaves by SwitchFiber.
inline void PrepareFiber(Fiber& fiber, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // First of all: a fiber never returns from its frames, so they are poisoned still.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.stack_bytes);
  fiber.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  // What emulation_switch pops: six registers, then the return address; at entry rsp % 16 == 8.
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + fiber.stack_bytes - 64);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

inline void SwitchFiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  emulation_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// First thing on a new fiber.
inline void EnterFiber(Fiber& came_from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &came_from.stack_bytes);
  came_from.stack = static_cast<char*>(const_cast<void*>(stack));
#else
  (void)came_from;
#endif
}

}  // namespace emulation
