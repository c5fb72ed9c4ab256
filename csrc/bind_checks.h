// Argument checks shared by the bindings. They know nothing of torch: pointers come as integers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sk {

// An address as Python passes it (Tensor.data_ptr()); 0 is null.
using Address = std::uintptr_t;

template <typename T>
inline T* Pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void Refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

inline void Require(bool condition, const std::string& message) {
  if (!condition) Refuse(message);
}

// The messages are made only where they are thrown: a call has some ten checks, and to build their
// strings each time took longer than a small product.
inline void RequireThreads(const char* kernel, int64_t threads) {
  if (threads >= 1 && threads <= 4096) return;
  Refuse(std::string(kernel) +
         ": threads must be between 1 and 4096 (torch.get_num_threads()), "
         "got " +
         std::to_string(threads));
}

// A null pointer is right only where there is nothing to point at.
inline void RequirePointer(const char* kernel, const char* name, Address address,
                           int64_t elements) {
  if (address != 0 || elements == 0) return;
  Refuse(std::string(kernel) + ": " + name + " must not be null, expected the address of " +
         std::to_string(elements) + " elements");
}

inline void RequireSize(const char* kernel, const char* name, int64_t value, int64_t least = 0) {
  if (value >= least) return;
  Refuse(std::string(kernel) + ": " + name + " must be at least " + std::to_string(least) +
         ", got " + std::to_string(value));
}

}  // namespace sk
