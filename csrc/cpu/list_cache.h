// Lists that kernels derive from a pattern, kept between calls: a pattern changes once in some
// hundred steps, and building the lists costs as much as the product where images are small.
//
// The owner of the pattern makes one cache for it, hands it to the launchers, and drops it when the
// index arrays change: the cache cannot see that. Safe to use from several threads; a second one
// waits while the first builds.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {

// What lists depend on beside the pattern: kernel, instruction set, geometry, blocks.
struct ListKey {
  static constexpr int kFields = 28;
  int64_t fields[kFields] = {};
};

class ListCache {
 public:
  ListCache();
  ~ListCache();
  ListCache(const ListCache&) = delete;
  ListCache& operator=(const ListCache&) = delete;

  // The block of `key`, or null. Blocks live as long as the cache. Call it, and what follows up to
  // publish(), under a ListLock.
  const void* find(const ListKey& key) const;
  // Whether it takes no more blocks: a net that meets ever new batch sizes must not grow for ever.
  // Lists of further keys are made for each call.
  bool full() const;
  // A new block, aligned to 64 bytes; not found before publish(). Throws std::bad_alloc.
  void* allocate(size_t bytes);
  void publish(const ListKey& key, void* block);

  int64_t bytes() const;
  // Bytes of all caches of the process.
  static int64_t total_bytes();

 private:
  friend class ListLock;
  struct State;
  State* state_;
};

// Holds a cache's mutex for a scope. No std:: template: sources compiled once per instruction set
// include this (simd.h says why that matters).
class ListLock {
 public:
  explicit ListLock(ListCache& cache);
  ~ListLock();
  ListLock(const ListLock&) = delete;
  ListLock& operator=(const ListLock&) = delete;

 private:
  ListCache& cache_;
};

}  // namespace sk
