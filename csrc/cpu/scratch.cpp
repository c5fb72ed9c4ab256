#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kHuge = size_t(2) << 20;
// A block much larger than asked for is left to a call that needs it.
constexpr size_t kWasteFactor = 4;

struct Block {
  char* data;
  size_t size;
  bool leased;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t held = 0;
  size_t peak = 0;
};

// Never destroyed: a lease may outlive the statics of a process that is going down.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

// Tiles are read at random: with 4 KB pages the walk misses the first-level TLB all the time, hence
// huge pages.
char* allocate(size_t& size) {
  const bool huge = size >= kHuge / 2;
  const size_t align = huge ? kHuge : kAlign;
  size = (size + align - 1) / align * align;
  void* p = nullptr;
  if (posix_memalign(&p, align, size) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(p, size, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(p);
}

void free_unleased(Pool& p) {
  for (auto& b : p.blocks) {
    if (b.leased) continue;
    p.held -= b.size;
    std::free(b.data);
    b.data = nullptr;
  }
  p.blocks.erase(
      std::remove_if(p.blocks.begin(), p.blocks.end(), [](const Block& b) { return !b.data; }),
      p.blocks.end());
}

char* acquire(size_t bytes, size_t& size) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  Block* best = nullptr;
  for (auto& b : p.blocks) {
    const bool fits =
        !b.leased && b.size >= bytes && b.size / kWasteFactor <= std::max(bytes, kHuge);
    if (fits && (!best || b.size < best->size)) best = &b;
  }
  if (best) {
    best->leased = true;
    size = best->size;
    return best->data;
  }
  free_unleased(p);  // one live block per concurrent call, not one per size ever asked for
  size = bytes;
  p.blocks.reserve(p.blocks.size() + 1);
  char* data = allocate(size);
  if (!data) throw std::bad_alloc();
  p.blocks.push_back({data, size, true});
  p.held += size;
  p.peak = std::max(p.peak, p.held);
  return data;
}

void give_back(char* data) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (auto& b : p.blocks) {
    if (b.data == data) b.leased = false;
  }
}

}  // namespace

size_t ScratchLease::padded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

ScratchLease::ScratchLease(size_t bytes) { data_ = acquire(std::max(bytes, kAlign), size_); }

ScratchLease::~ScratchLease() { give_back(data_); }

void* ScratchLease::take(size_t bytes) {
  const size_t need = padded(bytes);
  if (used_ + need > size_)
    throw std::logic_error("scratch: a kernel asked for more than it leased");
  void* p = data_ + used_;
  used_ += need;
  return p;
}

int64_t scratch_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return int64_t(p.held);
}

int64_t scratch_peak() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return int64_t(p.peak);
}

void release_scratch() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  free_unleased(p);
  p.peak = p.held;
}

}  // namespace sk
