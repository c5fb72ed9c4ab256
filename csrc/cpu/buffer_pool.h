// Memory of activations and gradients, kept between steps.
//
// A training step makes and drops the same few dozen large tensors. The C library gives blocks
// above 32 MB back to the system each time, and the kernel then clears every 4 KB page anew at the
// first write: on the machine of docs/kernel-log.md three times the cost of the write itself.
// Blocks here are aligned to huge pages and go back to the pool. The pool never holds more than the
// largest sum of blocks that was ever in use at once. Safe to use from several threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {

class PooledBuffer {
 public:
  explicit PooledBuffer(size_t bytes);  // throws std::bad_alloc; contents undefined
  ~PooledBuffer();
  PooledBuffer(const PooledBuffer&) = delete;
  PooledBuffer& operator=(const PooledBuffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_, size_;
};

int64_t pooled_bytes();  // held now: in use and kept for reuse
int64_t pooled_live();   // in use
void release_pooled();   // frees what is not in use, and forgets the peak

}  // namespace sk
