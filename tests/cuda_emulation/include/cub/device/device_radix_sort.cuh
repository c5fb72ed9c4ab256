// Stand-in for CUB's header of this name: the one entry point that csrc/cuda uses.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../stand_in.h"

namespace cub {

struct DeviceRadixSort {
  // Stable, by bits [begin_bit, end_bit) of unsigned keys, ascending.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* storage, size_t& bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, int items, int begin_bit,
                               int end_bit, cudaStream_t stream = nullptr) {
    static_assert(std::is_unsigned_v<Key>, "only unsigned keys are emulated");
    constexpr int kBits = 8 * sizeof(Key);
    if (items < 0 || begin_bit < 0 || end_bit > kBits || begin_bit > end_bit)
      return cudaErrorInvalidValue;
    const size_t count = static_cast<size_t>(items);
    const std::string problem = "cub::DeviceRadixSort::SortPairs of " + std::to_string(items) +
                                " items by bits " + std::to_string(begin_bit) + " to " +
                                std::to_string(end_bit);
    using emulation::Kind;
    return emulation::CubCall(
        problem, storage, bytes, 1279 + count * (sizeof(Key) + sizeof(Value)),
        {{"keys", keys, count * sizeof(Key), Kind::kRead},
         {"values", values, count * sizeof(Value), Kind::kRead},
         {"sorted keys", sorted_keys, count * sizeof(Key), Kind::kWrite},
         {"sorted values", sorted_values, count * sizeof(Value), Kind::kWrite}},
        stream, [=] {
          const Key high = end_bit == kBits ? ~Key(0) : (Key(1) << end_bit) - 1;
          const Key mask = high >> begin_bit << begin_bit;
          std::vector<int> order(count);
          for (int i = 0; i < items; ++i) order[static_cast<size_t>(i)] = i;
          std::stable_sort(order.begin(), order.end(),
                           [&](int a, int b) { return (keys[a] & mask) < (keys[b] & mask); });
          for (size_t i = 0; i < count; ++i) {
            sorted_keys[i] = keys[order[i]];
            sorted_values[i] = values[order[i]];
          }
        });
  }
};

}  // namespace cub
