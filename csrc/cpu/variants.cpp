// The table of csrc/variants.h; compiled once, for no instruction set.
#include "../variants.h"

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>

namespace sk {
namespace {

constexpr size_t kGeometryFields = sizeof(ConvGeometry) / sizeof(int64_t);
using Problem = std::array<int64_t, kGeometryFields + 3>;  // all of a key but the capacity
using ByCapacity = std::map<int64_t, Variant>;

struct Table {
  std::shared_mutex mutex;
  std::map<Problem, ByCapacity> problems;
  std::atomic<int64_t> others{0};  // entries that are not kRule
};

Table& table() {
  static Table* const t = new Table;  // never destroyed: threads may outlive static objects
  return *t;
}

Problem problem_of(const VariantKey& key) {
  Problem p;
  std::memcpy(p.data(), &key.g, sizeof(key.g));
  p[kGeometryFields] = int64_t(key.pass);
  p[kGeometryFields + 1] = key.bh;
  p[kGeometryFields + 2] = key.bw;
  return p;
}

// At least 1.
double ratio(int64_t a, int64_t b) {
  const double x = double(a > 0 ? a : 1), y = double(b > 0 ? b : 1);
  return x > y ? x / y : y / x;
}

}  // namespace

Variant find_variant(const VariantKey& key) {
  Table& t = table();
  if (t.others.load(std::memory_order_relaxed) == 0) return Variant::kRule;
  const std::shared_lock<std::shared_mutex> lock(t.mutex);
  const auto found = t.problems.find(problem_of(key));
  if (found == t.problems.end()) return Variant::kRule;
  Variant nearest = Variant::kRule;
  double least = kCapacityReach;
  for (const auto& [capacity, variant] : found->second) {
    const double away = ratio(capacity, key.capacity);
    if (away > least) continue;
    least = away;
    nearest = variant;
  }
  return nearest;
}

void set_variant(const VariantKey& key, Variant variant) {
  Table& t = table();
  const std::unique_lock<std::shared_mutex> lock(t.mutex);
  Variant& entry = t.problems[problem_of(key)].emplace(key.capacity, Variant::kRule).first->second;
  t.others += (variant != Variant::kRule) - (entry != Variant::kRule);
  entry = variant;
}

void clear_variants() {
  Table& t = table();
  const std::unique_lock<std::shared_mutex> lock(t.mutex);
  t.problems.clear();
  t.others = 0;
}

uint64_t mix_print(uint64_t print, int64_t field) {
  return (print ^ uint64_t(field)) * 0x9E3779B97F4A7C15u + (print >> 29);
}

int64_t count_variants() { return table().others; }

}  // namespace sk
