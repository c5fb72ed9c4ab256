// Tiled transposition: conversion between PyTorch's layouts and feature-major.
//
// A tile of kTile x kTile elements is moved in register blocks of kBlock x kBlock, so that every
// cache line of source and destination is touched while it is in L1; a plain strided copy misses
// on one of the two sides for every element.
#include <cstring>

#include "kernels_dense.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace sk {
namespace SK_ISA {
namespace {

constexpr int64_t kTile = 64;

#if defined(__AVX__)

constexpr int64_t kBlock = 8;

// dst [8][8] = transpose of src [8][8].
inline void TransposeBlock(float* dst, int64_t dst_pitch, const float* src, int64_t src_pitch) {
  __m256 row[8], pair[8], quad[8];
  // Each register takes half a row of two source rows that are 4 apart: the 128-bit lanes then
  // never have to be exchanged afterwards.
  for (int i = 0; i < 4; ++i) {
    const float* low = src + i * src_pitch;
    const float* high = src + (i + 4) * src_pitch;
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
    row[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)),
                                      _mm_loadu_ps(high + 4), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 2; ++i) {
      const __m256 first = pair[half + i], second = pair[half + i + 2];
      quad[half + 2 * i] = _mm256_shuffle_ps(first, second, _MM_SHUFFLE(1, 0, 1, 0));
      quad[half + 2 * i + 1] = _mm256_shuffle_ps(first, second, _MM_SHUFFLE(3, 2, 3, 2));
    }
  }
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(dst + i * dst_pitch, quad[i]);
}

#elif defined(__SSE__)

constexpr int64_t kBlock = 4;

inline void TransposeBlock(float* dst, int64_t dst_pitch, const float* src, int64_t src_pitch) {
  __m128 row0 = _mm_loadu_ps(src), row1 = _mm_loadu_ps(src + src_pitch);
  __m128 row2 = _mm_loadu_ps(src + 2 * src_pitch), row3 = _mm_loadu_ps(src + 3 * src_pitch);
  _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
  _mm_storeu_ps(dst, row0);
  _mm_storeu_ps(dst + dst_pitch, row1);
  _mm_storeu_ps(dst + 2 * dst_pitch, row2);
  _mm_storeu_ps(dst + 3 * dst_pitch, row3);
}

#else

constexpr int64_t kBlock = 4;

inline void TransposeBlock(float* dst, int64_t dst_pitch, const float* src, int64_t src_pitch) {
  for (int64_t c = 0; c < kBlock; ++c)
    for (int64_t r = 0; r < kBlock; ++r) dst[c * dst_pitch + r] = src[r * src_pitch + c];
}

#endif

inline void TransposeResidue(float* dst, int64_t dst_pitch, const float* src, int64_t src_pitch,
                             int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) dst[c * dst_pitch + r] = src[r * src_pitch + c];
}

void TransposeTile(float* dst, int64_t dst_pitch, const float* src, int64_t src_pitch, int64_t rows,
                   int64_t cols) {
  const int64_t full_rows = rows - rows % kBlock, full_cols = cols - cols % kBlock;
  for (int64_t c = 0; c < full_cols; c += kBlock) {
    for (int64_t r = 0; r < full_rows; r += kBlock) {
      TransposeBlock(dst + c * dst_pitch + r, dst_pitch, src + r * src_pitch + c, src_pitch);
    }
    TransposeResidue(dst + c * dst_pitch + full_rows, dst_pitch, src + full_rows * src_pitch + c,
                     src_pitch, rows - full_rows, kBlock);
  }
  TransposeResidue(dst + full_cols * dst_pitch, dst_pitch, src + full_cols, src_pitch, rows,
                   cols - full_cols);
}

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

void transpose(const TransposeArgs& args) {
  const int64_t row_tiles = (args.rows + kTile - 1) / kTile;
  const int64_t col_tiles = (args.cols + kTile - 1) / kTile;
  const int64_t tiles = args.count * row_tiles * col_tiles;
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    // Neighbours in the order of the loop continue the same destination rows.
    const int64_t r = tile % row_tiles * kTile;
    const int64_t c = tile / row_tiles % col_tiles * kTile;
    const int64_t matrix = tile / (row_tiles * col_tiles);
    TransposeTile(args.dst + matrix * args.dst_outer + c * args.dst_pitch + r, args.dst_pitch,
                  args.src + matrix * args.src_outer + r * args.src_pitch + c, args.src_pitch,
                  Min(kTile, args.rows - r), Min(kTile, args.cols - c));
  }
}

}  // namespace SK_ISA
}  // namespace sk
