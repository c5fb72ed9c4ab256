// Scratch memory of the native kernels: aligned blocks, kept and reused between calls, counted.
//
// A launcher leases one block for its whole call (lists, and one tile per thread) BEFORE its
// parallel region, so that std::bad_alloc never has to leave one. The pool is shared by all threads
// of the process and safe to use from any of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {

class ScratchLease {
 public:
  explicit ScratchLease(
      size_t bytes);  // throws std::bad_alloc; contents undefined; aligned to 64 bytes
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  // The next part of the lease, aligned to 64 bytes. Asking for more than was leased is a bug and
  // throws std::logic_error.
  void* take(size_t bytes);

  // What `take(bytes)` uses up: sum these to know what to lease.
  static size_t padded(size_t bytes);

 private:
  char* data_;
  size_t size_;
  size_t used_ = 0;
};

int64_t scratch_bytes();  // held now: leased and kept for reuse
int64_t scratch_peak();   // the most ever held since the start or the last release
void release_scratch();   // frees what is not leased, and resets the peak to what is left

}  // namespace sk
