// Every load and store of the kernels, without a line in them: their sources are compiled with
// -fsanitize=thread and -fsanitize=alignment,bounds,..., but linked with these functions in place
// of the sanitizers' own. This file itself is compiled without.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "runtime.h"

using emulation::CheckAccess;
using emulation::Fault;
using emulation::Kind;

namespace {

void Check(const void* address, size_t bytes, Kind kind) {
  if (!emulation::watching) return;
  emulation::Quiet quiet;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0 && bytes <= 16)
    Fault("misaligned access: %zu bytes at %p", bytes, address);
  CheckAccess(address, bytes, kind);
}

// The head of the records that the compiler makes for its handlers.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation place;
  const void* type;
  unsigned char log_alignment, kind;
};

void Undefined(const SourceLocation* place, const char* what) {
  if (!emulation::watching) std::abort();
  Fault("%s at %s:%u", what, place->file, place->line);
}

}  // namespace

extern "C" {

#define SK_TSAN(N)                                                         \
  void __tsan_read##N(void* address) { Check(address, N, Kind::kRead); }   \
  void __tsan_write##N(void* address) { Check(address, N, Kind::kWrite); } \
  void __tsan_unaligned_read##N(void* address) {                           \
    if (emulation::watching) CheckAccess(address, N, Kind::kRead);         \
  }                                                                        \
  void __tsan_unaligned_write##N(void* address) {                          \
    if (emulation::watching) CheckAccess(address, N, Kind::kWrite);        \
  }
SK_TSAN(1)
SK_TSAN(2)
SK_TSAN(4)
SK_TSAN(8)
SK_TSAN(16)
#undef SK_TSAN

void __tsan_read_range(void* address, size_t bytes) {
  if (emulation::watching && bytes > 0) CheckAccess(address, bytes, Kind::kRead);
}
void __tsan_write_range(void* address, size_t bytes) {
  if (emulation::watching && bytes > 0) CheckAccess(address, bytes, Kind::kWrite);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Of the host code beside the kernels (guards of static variables, reference counts).
char __tsan_atomic8_load(const volatile char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_add(volatile int* address, int operand, int) {
  return __atomic_fetch_add(address, operand, __ATOMIC_SEQ_CST);
}

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, void* pointer) {
  if (!emulation::watching) std::abort();
  if (pointer == nullptr) Fault("null pointer at %s:%u", data->place.file, data->place.line);
  Fault("misaligned access at %s:%u: %p is no multiple of %u", data->place.file, data->place.line,
        pointer, 1u << data->log_alignment);
}

#define SK_UBSAN(NAME, WHAT, ...) \
  void __ubsan_handle_##NAME(SourceLocation* place, ##__VA_ARGS__) { Undefined(place, WHAT); }
SK_UBSAN(out_of_bounds, "index out of bounds", void*)
SK_UBSAN(shift_out_of_bounds, "shift out of bounds", void*, void*)
SK_UBSAN(add_overflow, "signed overflow of +", void*, void*)
SK_UBSAN(sub_overflow, "signed overflow of -", void*, void*)
SK_UBSAN(mul_overflow, "signed overflow of *", void*, void*)
SK_UBSAN(negate_overflow, "signed overflow of -", void*)
SK_UBSAN(divrem_overflow, "division by zero", void*, void*)
SK_UBSAN(pointer_overflow, "pointer overflow", void*, void*)
#undef SK_UBSAN

}  // extern "C"
