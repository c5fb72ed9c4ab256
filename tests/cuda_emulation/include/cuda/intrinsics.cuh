// Stands in for csrc/cuda/intrinsics.cuh: the same functions, on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sk::cuda {

inline unsigned char* DynamicShared() {
  return static_cast<unsigned char*>(emulation::DynamicShared());
}

template <typename T, typename Tag = T>
inline T& StaticShared() {
  static const char tag = 0;
  return *static_cast<T*>(emulation::StaticShared(&tag, sizeof(T), alignof(T)));
}

template <int kBytes>
inline void CopyAsync(void* shared, const void* global, int source_bytes) {
  emulation::CopyStart(shared, global, kBytes, static_cast<size_t>(source_bytes));
}
inline void CommitCopies() { emulation::CopyCommit(); }
template <int kGroups>
inline void WaitCopies() {
  emulation::CopyWait(kGroups);
}

struct MatrixLoad {
  const unsigned char* row;  // in: 8 elements of 16 bits
  bool transposed;
  uint32_t to[4];  // out
};

// Lane i receives of matrix m the elements (i / 4, 2 * (i % 4)) and the next one of that row;
// transposed, of that column.
inline void ResolveMatrices(void* const* operands, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<MatrixLoad*>(operands[lane]);
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int slow = lane / 4, fast = lane % 4 * 2 + half;
        const int row = mine->transposed ? fast : slow, column = mine->transposed ? slow : fast;
        std::memcpy(&pair[half], static_cast<MatrixLoad*>(operands[8 * m + row])->row + 2 * column,
                    2);
      }
      mine->to[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}

template <bool kTransposed>
inline void LoadMatrices(uint32_t (&to)[4], const void* shared_row, EMULATION_HERE) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
    emulation::Fault("ldmatrix: row address %p is no multiple of 16", shared_row);
  emulation::CheckShared(shared_row, 16, emulation::Kind::kRead);
  MatrixLoad load = {static_cast<const unsigned char*>(shared_row), kTransposed, {}};
  emulation::WarpMeet("ldmatrix", 0xffffffffu, ResolveMatrices, &load, place);
  for (int m = 0; m < 4; ++m) to[m] = load.to[m];
}

inline float FromBits(__half, uint16_t bits) { return __half2float(__half{bits}); }
inline float FromBits(__nv_bfloat16, uint16_t bits) {
  return __bfloat162float(__nv_bfloat16{bits});
}

template <typename T>
struct Fragments {
  float d[4];
  uint32_t a[4], b[2];
};

// The fragments of m16n8k16 as the PTX ISA describes them; test_fragments.py holds them against
// CuTe's layouts.
template <typename T>
void ResolveMultiply(void* const* operands, uint32_t) {
  float a[16][16], b[16][8];
  const auto element = [](uint32_t word, int half) {
    return FromBits(T{}, static_cast<uint16_t>(word >> (16 * half)));
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments<T>*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i)
      a[group + (i / 2 % 2) * 8][pair + i % 2 + i / 4 * 8] = element(f.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[pair + i % 2 + i / 2 * 8][group] = element(f.b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& f = *static_cast<Fragments<T>*>(operands[lane]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k)
        f.d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

template <typename T>
inline void MultiplyAccumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               EMULATION_HERE) {
  Fragments<T> f;
  std::memcpy(f.d, d, sizeof d);
  std::memcpy(f.a, a, sizeof a);
  std::memcpy(f.b, b, sizeof b);
  emulation::WarpMeet("mma.sync", 0xffffffffu, ResolveMultiply<T>, &f, place);
  for (int i = 0; i < 4; ++i) d[i] = f.d[i];
}

}  // namespace sk::cuda
