#include "list_cache.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace sk {
namespace {

std::atomic<int64_t> total{0};

// Some batch sizes, and for each the phases of a strided input gradient.
constexpr size_t kMaxBlocks = 32;

struct Entry {
  ListKey key;
  void* block;
};

}  // namespace

struct ListCache::State {
  std::mutex mutex;
  std::vector<Entry> entries;
  std::vector<void*> blocks;
  std::atomic<int64_t> bytes{0};
};

ListCache::ListCache() : state_(new State) {}

ListCache::~ListCache() {
  for (void* block : state_->blocks) std::free(block);
  total -= state_->bytes;
  delete state_;
}

const void* ListCache::find(const ListKey& key) const {
  for (const Entry& entry : state_->entries)
    if (std::memcmp(entry.key.fields, key.fields, sizeof(key.fields)) == 0) return entry.block;
  return nullptr;
}

bool ListCache::full() const { return state_->blocks.size() >= kMaxBlocks; }

void* ListCache::allocate(size_t bytes) {
  state_->blocks.reserve(state_->blocks.size() + 1);
  state_->entries.reserve(state_->entries.size() + 1);
  void* block = nullptr;
  if (posix_memalign(&block, 64, bytes < 64 ? 64 : bytes) != 0) throw std::bad_alloc();
  state_->blocks.push_back(block);
  state_->bytes += int64_t(bytes);
  total += int64_t(bytes);
  return block;
}

void ListCache::publish(const ListKey& key, void* block) {
  state_->entries.push_back({key, block});
}

int64_t ListCache::bytes() const { return state_->bytes; }
int64_t ListCache::total_bytes() { return total; }

ListLock::ListLock(ListCache& cache) : cache_(cache) { cache_.state_->mutex.lock(); }
ListLock::~ListLock() { cache_.state_->mutex.unlock(); }

}  // namespace sk
