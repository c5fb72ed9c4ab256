#include "pattern_check.h"

#include <stdexcept>
#include <string>

namespace sk {
namespace {

// Below this many integers a parallel region costs more than the check.
constexpr int64_t kParallel = 1 << 15;

std::string at(const char* name, int64_t position) {
  return std::string(name) + "[" + std::to_string(position) + "]";
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument(
      what + "; the pattern's index tensors are damaged: SparsityPattern.validate() examines them");
}

void check_starts(const PatternArrays& p, int64_t capacity) {
  if (p.starts[0] != 0)
    refuse(at(p.starts_name, 0) + " must be 0, got " + std::to_string(p.starts[0]));
  for (int64_t i = 1; i <= p.lines; ++i) {
    if (p.starts[i] < p.starts[i - 1])
      refuse(at(p.starts_name, i) + " must be at least " + std::to_string(p.starts[i - 1]) +
             ", the entry before it, got " + std::to_string(p.starts[i]));
    if (p.starts[i] > capacity)
      refuse(at(p.starts_name, i) + " must be at most the capacity, " + std::to_string(capacity) +
             ", got " + std::to_string(p.starts[i]));
  }
}

// Branch-free over the entries, so that the compiler takes several at once.
bool line_is_wrong(const PatternArrays& p, int64_t begin, int64_t end, int64_t capacity) {
  if (begin == end) return false;
  int wrong = int(p.index[begin] < 0) | int(p.index[end - 1] >= p.bound);
  for (int64_t e = begin + 1; e < end; ++e) wrong |= int(p.index[e] <= p.index[e - 1]);
  if (p.perm) {
    const uint32_t most = uint32_t(capacity > INT32_MAX ? INT32_MAX : capacity - 1);
    for (int64_t e = begin; e < end; ++e) wrong |= int(uint32_t(p.perm[e]) > most);
  }
  return wrong != 0;
}

// Finds again what a thread found, and says where it is.
[[noreturn]] void explain(const PatternArrays& p, int64_t capacity) {
  for (int64_t line = 0; line < p.lines; ++line) {
    for (int64_t e = p.starts[line]; e < p.starts[line + 1]; ++e) {
      if (p.index[e] < 0 || p.index[e] >= p.bound)
        refuse(at(p.index_name, e) + " must be at least 0 and below " + std::to_string(p.bound) +
               ", got " + std::to_string(p.index[e]));
      if (e > p.starts[line] && p.index[e] <= p.index[e - 1])
        refuse(at(p.index_name, e) + " must be above " + std::to_string(p.index[e - 1]) +
               ", the entry before it in line " + std::to_string(line) + ", got " +
               std::to_string(p.index[e]));
      if (p.perm && (p.perm[e] < 0 || p.perm[e] >= capacity))
        refuse(at("t_perm", e) + " must be at least 0 and below the capacity, " +
               std::to_string(capacity) + ", got " + std::to_string(p.perm[e]));
    }
  }
  refuse(std::string(p.index_name) + " was changed during the call");
}

}  // namespace

void check_pattern(const PatternArrays& p, int64_t capacity, int threads) {
  check_starts(p, capacity);
  const bool parallel = p.starts[p.lines] > kParallel;
  int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : wrong) if (parallel)
  for (int64_t line = 0; line < p.lines; ++line)
    wrong |= int(line_is_wrong(p, p.starts[line], p.starts[line + 1], capacity));
  if (wrong) explain(p, capacity);
}

void check_tile(double floats, const ConvGeometry& g) {
  if (floats <= double(INT32_MAX)) return;
  auto pair = [](int64_t h, int64_t w) { return std::to_string(h) + "x" + std::to_string(w); };
  throw std::invalid_argument(
      "the smallest tile of this shape exceeds 2^31 elements: expected less channels, a smaller "
      "kernel or dilation, got batch " +
      std::to_string(g.batch) + ", channels " + std::to_string(g.in_channels) + " -> " +
      std::to_string(g.out_channels) + ", image " + pair(g.in_h, g.in_w) + ", kernel " +
      pair(g.kh, g.kw) + ", dilation " + pair(g.dil_h, g.dil_w) + ", stride " +
      pair(g.stride_h, g.stride_w));
}

}  // namespace sk
