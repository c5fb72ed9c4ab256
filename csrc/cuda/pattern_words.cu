// Descriptions of layers on their way to the GPU.
#include "cuda/pattern.cuh"

namespace sk::cuda {

namespace {

// Kernel parameters may take 4096 bytes on every architecture.
struct Words {
  static constexpr int kMost = 500;
  int64_t word[kMost];
};

__global__ void __launch_bounds__(kPatternThreads)
    PutWordsKernel(const __grid_constant__ Words words, int count, int64_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kPatternThreads)
    to[i] = words.word[i];
}

}  // namespace

void PutWords(const PatternCall& what, const void* from, int64_t bytes, void* to, void* stream) {
  const auto* source = static_cast<const unsigned char*>(from);
  for (int64_t at = 0; at < bytes; at += Words::kMost * 8) {
    Words words = {};
    const int64_t now = std::min<int64_t>(bytes - at, Words::kMost * 8);
    std::memcpy(words.word, source + at, static_cast<size_t>(now));
    LaunchTiles(what, &PutWordsKernel, 1, stream, words, static_cast<int>(now / 8),
                static_cast<int64_t*>(to) + at / 8);
  }
}

}  // namespace sk::cuda
