// Dense weight gradient of a 3x3 convolution from transformed tiles: 16 products of matrices for
// every 36 of the direct sum (tile_transform.h). For the growth signal only.
//
// Work goes chunk by chunk over (tile, part of the batch), and in a chunk line by line of the
// transform: all threads transform a line's four planes into scratch, then multiply them. A plane
// holds, for one of the 16 products, the transformed pixels of every channel, stretch by stretch:
// [stretches][channels][pitch]. Rows that are multiplied together lie one after another; spread
// over as many pages they cost a third of the speed.
// Every sum has one owner and one order, whatever the number of threads.
#include "kernels_dense.h"
#include "tile_transform.h"

namespace sk {
namespace SK_ISA {
namespace {

// A block of sums in registers: kRows output by kCols input channels. With kCols operands and one
// more they fill the registers.
#if defined(__AVX512F__) || defined(SK_EMULATE_AVX512)
constexpr int kRows = 6, kCols = 4;
#else
constexpr int kRows = 4, kCols = 3;
#endif
constexpr int kBlock = kRows * kCols;
constexpr int kProducts = kSide * kSide;
constexpr int64_t kMaxLanes = 512;  // of the batch, that one unit of a chunk holds
// Floats of one row that are multiplied at a stretch: two bands of rows and kCols columns of them
// fit in the first-level cache, and the sum over the lanes at the end costs little.
constexpr int64_t kDepth = 512;
constexpr int64_t kPanel = 16;  // columns of blocks whose operands stay in the second-level cache
constexpr int64_t kBand = 16;   // rows of blocks that one thread takes at once
constexpr int64_t kScratch = 1 << 20;  // floats of transformed pixels that a chunk aims at
constexpr int64_t kSkew = 16;  // floats between rows, so that they do not share their cache sets

alignas(64) const float kZeros[kMaxLanes] = {};

struct Plan {
  int64_t tiles_w, units;    // tiles of a row; tiles times parts of the batch
  int64_t parts, lanes;      // parts of the batch, and floats of each, a multiple of kLanes
  int64_t stretch, chunk;    // units of a stretch and of a chunk
  int64_t pitch;             // floats from one channel of a stretch to the next
  int64_t plane_u, plane_v;  // floats from one plane of the gradient, of the input, to the next
  int64_t row_blocks, col_blocks;
  int64_t operands, sums;  // floats of scratch

  explicit Plan(const TileWgradArgs& a) {
    const int64_t channels = a.out_channels + a.in_channels;
    parts = ceil_div(a.batch, kMaxLanes);
    lanes = round_up(ceil_div(a.batch, parts), int64_t(kLanes));
    tiles_w = ceil_div(a.out_w, kStep);
    units = tiles_w * ceil_div(a.out_h, kStep) * parts;
    stretch = imin(units, kDepth / lanes);
    pitch = round_up(stretch * lanes, kSkew) + kSkew;
    const int64_t stretches = imax<int64_t>(1, kScratch / (kSide * channels * pitch));
    chunk = imin(round_up(units, stretch), stretches * stretch);
    plane_u = a.out_channels * pitch * (chunk / stretch) + 2 * kSkew;
    plane_v = a.in_channels * pitch * (chunk / stretch) + 2 * kSkew;
    operands = round_up(kSide * (plane_u + plane_v), kSkew);
    row_blocks = ceil_div(a.out_channels, int64_t(kRows));
    col_blocks = ceil_div(a.in_channels, int64_t(kCols));
    sums = kProducts * row_blocks * col_blocks * kBlock;
  }
};

struct Channel {
  const float* data;  // [height][width][batch]
  int64_t height, width, batch;
};

// The pixels of `size` rows and columns from (row, col), batch entries from `start`.
TilePixels pixels(const Channel& c, int64_t row, int64_t col, int size, int64_t start) {
  TilePixels tile = {};
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const int64_t y = row + i, x = col + j;
      const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
      tile.at[i][j] = inside ? c.data + (y * c.width + x) * c.batch + start : kZeros;
    }
  }
  return tile;
}

template <bool Input>
void transform(float* to, int64_t plane, const TilePixels& tile, int line, int64_t count,
               int64_t lanes) {
  switch (line) {
    case 0:
      return transform_line<Input, 0>(to, plane, tile, count, lanes);
    case 1:
      return transform_line<Input, 1>(to, plane, tile, count, lanes);
    case 2:
      return transform_line<Input, 2>(to, plane, tile, count, lanes);
    default:
      return transform_line<Input, 3>(to, plane, tile, count, lanes);
  }
}

// Line `line` of units [first, first + count) of one channel: input channels first, then output.
void transform_channel(const TileWgradArgs& a, const Plan& p, float* u, float* v, int line,
                       int64_t channel, int64_t first, int64_t count) {
  const bool input = channel < a.in_channels;
  const int64_t c = input ? channel : channel - a.in_channels;
  const Channel image =
      input ? Channel{a.x + c * a.in_h * a.in_w * a.batch, a.in_h, a.in_w, a.batch}
            : Channel{a.grad + c * a.out_h * a.out_w * a.batch, a.out_h, a.out_w, a.batch};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = (first + i) / p.parts, start = (first + i) % p.parts * p.lanes;
    const int64_t row = tile / p.tiles_w * kStep, col = tile % p.tiles_w * kStep;
    const int64_t used = imax<int64_t>(0, imin(p.lanes, a.batch - start));
    const int64_t channels = input ? a.in_channels : a.out_channels;
    const int64_t at = (i / p.stretch * channels + c) * p.pitch + i % p.stretch * p.lanes;
    if (input) {
      transform<true>(v + at, p.plane_v,
                      pixels(image, row - a.pad_top, col - a.pad_left, kSide, start), line, used,
                      p.lanes);
    } else {
      transform<false>(u + at, p.plane_u, pixels(image, row, col, kStep, start), line, used,
                       p.lanes);
    }
  }
}

// Makes the compiler load `a` once: it would else read the operand again for each row, and two
// loads a cycle are all there are.
SK_INLINE void keep_in_register(Vec& a) {
#if defined(__AVX512F__) && !defined(SK_EMULATE_AVX512)
  asm("" : "+v"(a));
#elif defined(__SSE2__) && !defined(SK_EMULATE_AVX512)
  asm("" : "+x"(a));
#else
  (void)a;  // two registers, or another machine's
#endif
}

// sums [kBlock] += rows . cols over `depth` floats, a multiple of kLanes. Not inlined: among the
// caller's variables the compiler keeps some of the sums in memory, at a quarter of the speed.
__attribute__((noinline)) void multiply_block(float* sums, const float* const (&rows)[kRows],
                                              const float* const (&cols)[kCols], int64_t depth) {
  Vec acc[kBlock];
  SK_UNROLL
  for (int i = 0; i < kBlock; ++i) acc[i] = vzero();
  for (int64_t k = 0; k < depth; k += kLanes) {
    Vec b[kCols];
    SK_UNROLL
    for (int j = 0; j < kCols; ++j) {
      b[j] = vload(cols[j] + k);
      keep_in_register(b[j]);
    }
    SK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec a = vload(rows[i] + k);
      SK_UNROLL
      for (int j = 0; j < kCols; ++j) acc[i * kCols + j] = vfma(a, b[j], acc[i * kCols + j]);
    }
  }
  add_sums<kBlock>(sums, acc);
}

// What one thread multiplies at once: of one plane, a band of row blocks by a panel of column
// blocks.
struct Piece {
  const float *u, *v;  // the plane's operands
  float* sums;         // of the plane: [col_blocks][row_blocks][kBlock]
  int64_t row_begin, row_end, col_begin, col_end;
};

// The last blocks' missing channels are read from the last channel; their sums are never used.
void multiply_piece(const TileWgradArgs& a, const Plan& p, const Piece& piece, int64_t units,
                    bool first) {
  for (int64_t unit = 0; unit < units; unit += p.stretch) {
    const int64_t depth = imin(p.stretch, units - unit) * p.lanes;
    const float* u = piece.u + unit / p.stretch * a.out_channels * p.pitch;
    const float* v = piece.v + unit / p.stretch * a.in_channels * p.pitch;
    for (int64_t two = piece.row_begin; two < piece.row_end; two += 2) {
      for (int64_t col = piece.col_begin; col < piece.col_end; ++col) {
        const float* cols[kCols];
        for (int j = 0; j < kCols; ++j)
          cols[j] = v + imin(col * kCols + j, a.in_channels - 1) * p.pitch;
        for (int64_t row = two; row < imin(two + 2, piece.row_end); ++row) {
          const float* rows[kRows];
          for (int i = 0; i < kRows; ++i)
            rows[i] = u + imin(row * kRows + i, a.out_channels - 1) * p.pitch;
          float* sums = piece.sums + (col * p.row_blocks + row) * kBlock;
          if (first && unit == 0) zero_floats(sums, kBlock);
          multiply_block(sums, rows, cols, depth);
        }
      }
    }
  }
}

// The nine sums of each weight of one row of blocks from its 16 products.
void finish_row(const TileWgradArgs& a, const Plan& p, const float* sums, int64_t row) {
  const int64_t plane = p.col_blocks * p.row_blocks * kBlock;
  const int64_t rows = imin<int64_t>(kRows, a.out_channels - row * kRows);
  for (int64_t col = 0; col < p.col_blocks; ++col) {
    const float* m = sums + (col * p.row_blocks + row) * kBlock;
    float half[3][kSide][kBlock], y[3][3][kBlock], line[kSide][kBlock];
    for (int q = 0; q < kSide; ++q) {
      for (int i = 0; i < kSide; ++i)
        for (int e = 0; e < kBlock; ++e) line[i][e] = m[(i * kSide + q) * plane + e];
      sums_of_products<kBlock>(half[0][q], kSide * kBlock, line[0], kBlock);
    }
    for (int ky = 0; ky < 3; ++ky) sums_of_products<kBlock>(y[ky][0], kBlock, half[ky][0], kBlock);
    const int64_t cols = imin<int64_t>(kCols, a.in_channels - col * kCols);
    for (int64_t i = 0; i < rows; ++i)
      for (int tap = 0; tap < 9; ++tap)
        for (int64_t j = 0; j < cols; ++j)
          a.dw[((row * kRows + i) * 9 + tap) * a.in_channels + col * kCols + j] =
              y[tap / 3][tap % 3][i * kCols + j];
  }
}

}  // namespace

int64_t wgrad_tiles_scratch(const TileWgradArgs& a) {
  const Plan p(a);
  return p.operands + p.sums;
}

void wgrad_tiles(const TileWgradArgs& a) {
  const Plan p(a);
  float *u = a.scratch, *v = u + kSide * p.plane_u, *sums = a.scratch + p.operands;
  const int64_t panels = ceil_div(p.col_blocks, kPanel), panel = ceil_div(p.col_blocks, panels);
  const int64_t bands = ceil_div(p.row_blocks, kBand);
  const int64_t plane = p.col_blocks * p.row_blocks * kBlock;
#pragma omp parallel num_threads(a.threads)
  {
    for (int64_t first = 0; first < p.units; first += p.chunk) {
      const int64_t units = imin(p.chunk, p.units - first);
      for (int line = 0; line < kSide; ++line) {
        // Dynamic: what a thread computes does not depend on which thread it is.
#pragma omp for schedule(dynamic, 4)
        for (int64_t channel = 0; channel < a.in_channels + a.out_channels; ++channel)
          transform_channel(a, p, u, v, line, channel, first, units);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < kSide * panels * bands; ++task) {
          const int64_t q = task / (panels * bands);
          const int64_t col = task / bands % panels * panel, row = task % bands * kBand;
          multiply_piece(
              a, p,
              {u + q * p.plane_u, v + q * p.plane_v, sums + (line * kSide + q) * plane, row,
               imin(row + kBand, p.row_blocks), col, imin(col + panel, p.col_blocks)},
              units, first == 0);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.row_blocks; ++row) finish_row(a, p, sums, row);
  }
}

}  // namespace SK_ISA
}  // namespace sk
