#include "buffer_pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {
namespace {

constexpr size_t kHuge = size_t(2) << 20;

struct Block {
  void* data;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> free;  // the longest unused first
  size_t live = 0, kept = 0, peak = 0;
};

// Never destroyed: a tensor may outlive the statics of a process that is going down.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

void drop_oldest(Pool& p) {
  p.kept -= p.free.front().size;
  std::free(p.free.front().data);
  p.free.erase(p.free.begin());
}

// A kept block that wastes at most a quarter, or null.
void* take_kept(Pool& p, size_t size, size_t& found) {
  auto best = p.free.end();
  for (auto it = p.free.begin(); it != p.free.end(); ++it) {
    const bool fits = it->size >= size && it->size - size <= size / 4;
    if (fits && (best == p.free.end() || it->size < best->size)) best = it;
  }
  if (best == p.free.end()) return nullptr;
  void* data = best->data;
  found = best->size;
  p.kept -= found;
  p.free.erase(best);
  return data;
}

void* acquire(size_t bytes, size_t& size) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t wanted = (std::max(bytes, size_t(1)) + kHuge - 1) / kHuge * kHuge;
  void* data = take_kept(p, wanted, size);
  if (!data) {
    size = wanted;
    p.free.reserve(p.free.size() + 1);
    const size_t allowed = std::max(p.peak, p.live + size);
    while (!p.free.empty() && p.live + p.kept + size > allowed) drop_oldest(p);
    if (posix_memalign(&data, kHuge, size) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);
#endif
  }
  p.live += size;
  p.peak = std::max(p.peak, p.live);
  return data;
}

void give_back(void* data, size_t size) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.live -= size;
  try {
    p.free.push_back({data, size});
    p.kept += size;
  } catch (const std::bad_alloc&) {  // no room to remember it
    std::free(data);
  }
}

}  // namespace

PooledBuffer::PooledBuffer(size_t bytes) : bytes_(bytes) { data_ = acquire(bytes, size_); }

PooledBuffer::~PooledBuffer() { give_back(data_, size_); }

int64_t pooled_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return int64_t(p.live + p.kept);
}

int64_t pooled_live() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return int64_t(p.live);
}

void release_pooled() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.free.empty()) drop_oldest(p);
  p.peak = p.live;
}

}  // namespace sk
