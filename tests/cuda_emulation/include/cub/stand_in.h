// What the stand-ins for CUB have in common: its protocol, checked.
//
// An entry point is called twice: with null for the size of its temporary storage, then with the
// storage. Here the second call is a fault if the first was not made for the same problem, and
// cudaErrorInvalidValue (CUB's own answer) if the storage is smaller than it said. The storage is
// overwritten from end to end, so that nothing else may lie in it.
#pragma once

#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

struct Range {
  const char* name;
  const void* begin;
  size_t bytes;
  Kind kind;
};

inline std::set<std::string>& AskedSizes() {
  static std::set<std::string> asked;
  return asked;
}

// `problem` names entry point, types and sizes. `work` runs as a kernel of one thread, when the
// stream comes to it.
template <typename Work>
cudaError_t CubCall(const std::string& problem, void* storage, size_t& bytes, size_t wanted,
                    std::vector<Range> ranges, cudaStream_t stream, Work work) {
  if (storage == nullptr) {
    AskedSizes().insert(problem);
    bytes = wanted;
    return cudaSuccess;
  }
  if (bytes < wanted) return cudaErrorInvalidValue;
  const auto run = [=, bytes = bytes] {
    if (AskedSizes().count(problem) == 0)
      Fault("%s: called without asking for the size of its temporary storage", problem.c_str());
    const Range temporary = {"temporary storage", storage, bytes, Kind::kWrite};
    const auto apart = [&](const Range& a, const Range& b) {
      const auto *first = static_cast<const char*>(a.begin),
                 *second = static_cast<const char*>(b.begin);
      if (a.bytes > 0 && b.bytes > 0 && first < second + b.bytes && second < first + a.bytes)
        Fault("%s: %s and %s overlap", problem.c_str(), a.name, b.name);
    };
    CheckAccess(storage, bytes, Kind::kWrite);
    for (const Range& range : ranges) {
      if (range.bytes > 0) CheckAccess(range.begin, range.bytes, range.kind);
      apart(temporary, range);
      for (const Range& other : ranges)
        if (&other < &range && (range.kind == Kind::kWrite || other.kind == Kind::kWrite))
          apart(other, range);
    }
    std::memset(storage, 0xa5, bytes);
    work();
    std::memset(storage, 0x5a, bytes);
  };
  return Submit("launch", stream, [=] { return RunGrid(dim3(1), dim3(1), 0, run); });
}

}  // namespace emulation
