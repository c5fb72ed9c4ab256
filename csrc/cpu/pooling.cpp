// Max and average pooling over feature-major activations: a window's taps are rows of `batch`
// contiguous elements, so every loop over the batch is a vector loop and padding means fewer taps.
// Threads own channels (backward) or channels x output rows (forward).
#include <cstdint>

#include "kernels_dense.h"
#include "stream.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kWindowLanes = 64;  // batch elements whose running maximum is kept at once

SK_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
SK_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// Taps [begin, end) of one axis that fall inside the image.
struct TapRange {
  int64_t begin, end;
};

inline TapRange TapsInside(int64_t start, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t begin = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t inside = start < size ? (size - start + dilation - 1) / dilation : 0;
  const int64_t end = Min(taps, inside);
  return {begin, Max(begin, end)};
}

// One window for `lanes` batch elements: x points at the image of the channel, offset by the batch.
void MaxWindow(float* y, uint8_t* argmax, const float* x, const PoolDims& d, int64_t start_y,
               int64_t start_x, TapRange rows, TapRange cols, int lanes) {
  float best[kWindowLanes];
  int32_t tap_of[kWindowLanes];
  const bool empty = rows.begin >= rows.end || cols.begin >= cols.end;
  const int32_t first = empty ? kNoTap : static_cast<int32_t>(rows.begin * d.kw + cols.begin);
  for (int lane = 0; lane < kWindowLanes; ++lane) {
    best[lane] = -__builtin_inff();
    tap_of[lane] = first;
  }
  for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
    for (int64_t kx = cols.begin; kx < cols.end; ++kx) {
      const int64_t pixel = (start_y + ky * d.dh) * d.in_w + start_x + kx * d.dw;
      const float* value = x + pixel * d.batch;
      const int32_t tap = static_cast<int32_t>(ky * d.kw + kx);
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) {
        // Not (value <= best) is true for a NaN value; a NaN best is then beaten only by a NaN.
        const bool nan = value[lane] != value[lane];
        const bool better = value[lane] > best[lane] || nan;
        best[lane] = better ? value[lane] : best[lane];
        tap_of[lane] = better ? tap : tap_of[lane];
      }
    }
  }
  for (int lane = 0; lane < lanes; ++lane) y[lane] = best[lane];
  for (int lane = 0; lane < lanes; ++lane) argmax[lane] = static_cast<uint8_t>(tap_of[lane]);
}

// A window of 2 x 2 pixels without padding, all lanes: one straight line for the compiler.
void MaxWindow2x2(float* y, uint8_t* argmax, const float* upper, const float* lower, int64_t step,
                  int64_t lanes) {
#pragma omp simd
  for (int64_t n = 0; n < lanes; ++n) {
    const float right = upper[n + step], below = lower[n], last = lower[n + step];
    float best = upper[n];
    int32_t tap = 0;
    // As in MaxWindow: a NaN always wins, and a NaN best is beaten by nothing else.
    const bool second = (right > best) | (right != right);
    best = second ? right : best;
    tap = second ? 1 : tap;
    const bool third = (below > best) | (below != below);
    best = third ? below : best;
    tap = third ? 2 : tap;
    const bool fourth = (last > best) | (last != last);
    best = fourth ? last : best;
    tap = fourth ? 3 : tap;
    y[n] = best;
    argmax[n] = static_cast<uint8_t>(tap);
  }
}

// Windows that lie inside the image, none of whose pixels another one has.
bool Disjoint(const PoolDims& d) {
  return d.sh >= d.kh && d.sw >= d.kw && d.ph == 0 && d.pw == 0 && d.dh == 1 && d.dw == 1 &&
         (d.out_h - 1) * d.sh + d.kh <= d.in_h && (d.out_w - 1) * d.sw + d.kw <= d.in_w;
}

void MaxRow2x2(const MaxPoolArgs& args, int64_t channel, int64_t oy) {
  const PoolDims& d = args.dims;
  const float* upper = args.x + (channel * d.in_h + oy * d.sh) * d.in_w * d.batch;
  const float* lower = upper + d.in_w * d.batch;
  const int64_t out = (channel * d.out_h + oy) * d.out_w * d.batch;
  for (int64_t ox = 0; ox < d.out_w; ++ox) {
    const int64_t at = ox * d.sw * d.batch, to = out + ox * d.batch;
    MaxWindow2x2(args.y + to, args.argmax + to, upper + at, lower + at, d.batch, d.batch);
  }
}

void MaxRow(const MaxPoolArgs& args, int64_t channel, int64_t oy) {
  const PoolDims& d = args.dims;
  if (d.kh == 2 && d.kw == 2 && Disjoint(d)) return MaxRow2x2(args, channel, oy);
  const float* image = args.x + channel * d.in_h * d.in_w * d.batch;
  const int64_t start_y = oy * d.sh - d.ph;
  const TapRange rows = TapsInside(start_y, d.kh, d.dh, d.in_h);
  for (int64_t ox = 0; ox < d.out_w; ++ox) {
    const int64_t start_x = ox * d.sw - d.pw;
    const TapRange cols = TapsInside(start_x, d.kw, d.dw, d.in_w);
    const int64_t out = ((channel * d.out_h + oy) * d.out_w + ox) * d.batch;
    for (int64_t n = 0; n < d.batch; n += kWindowLanes) {
      MaxWindow(args.y + out + n, args.argmax + out + n, image + n, d, start_y, start_x, rows, cols,
                static_cast<int>(Min(kWindowLanes, d.batch - n)));
    }
  }
}

inline void Zero(float* values, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = 0.0f;
}

// dx [batch] = grad where the window's maximum was `tap`, else 0.
template <bool kStream>
void PlaceGradient(float* dx, const float* grad, const uint8_t* tap_of, int64_t tap,
                   int64_t lanes) {
  const float number = static_cast<float>(tap);
  const Vec taps = vset1(&number);
  int64_t n = 0;
  for (; n + kLanes <= lanes; n += kLanes) {
    Put<kStream>(dx + n, vkeep_equal(vload(grad + n), vload_bytes(tap_of + n), taps));
  }
  for (; n < lanes; ++n) dx[n] = tap_of[n] == tap ? grad[n] : 0.0f;
}

template <bool kStream>
void PutZeros(float* values, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Put<kStream>(values + i, vzero());
  for (; i < count; ++i) values[i] = 0.0f;
}

// Of disjoint windows: every pixel is written once, so nothing has to be cleared or read before.
template <bool kStream>
void DisjointBackwardChannel(const MaxPoolBackwardArgs& args, int64_t channel) {
  const PoolDims& d = args.dims;
  float* dx = args.dx + channel * d.in_h * d.in_w * d.batch;
  for (int64_t y = 0; y < d.in_h; ++y) {
    const int64_t oy = y / d.sh, ky = y % d.sh;
    const bool row_inside = oy < d.out_h && ky < d.kh;
    for (int64_t x = 0; x < d.in_w; ++x, dx += d.batch) {
      const int64_t ox = x / d.sw, kx = x % d.sw;
      if (!row_inside || ox >= d.out_w || kx >= d.kw) {
        PutZeros<kStream>(dx, d.batch);
        continue;
      }
      const int64_t out = ((channel * d.out_h + oy) * d.out_w + ox) * d.batch;
      PlaceGradient<kStream>(dx, args.grad + out, args.argmax + out, ky * d.kw + kx, d.batch);
    }
  }
}

void MaxBackwardChannel(const MaxPoolBackwardArgs& args, int64_t channel) {
  const PoolDims& d = args.dims;
  float* image = args.dx + channel * d.in_h * d.in_w * d.batch;
  Zero(image, d.in_h * d.in_w * d.batch);
  for (int64_t oy = 0; oy < d.out_h; ++oy) {
    const int64_t start_y = oy * d.sh - d.ph;
    const TapRange rows = TapsInside(start_y, d.kh, d.dh, d.in_h);
    for (int64_t ox = 0; ox < d.out_w; ++ox) {
      const int64_t start_x = ox * d.sw - d.pw;
      const TapRange cols = TapsInside(start_x, d.kw, d.dw, d.in_w);
      const int64_t out = ((channel * d.out_h + oy) * d.out_w + ox) * d.batch;
      const float* grad = args.grad + out;
      const uint8_t* tap_of = args.argmax + out;
      for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
        for (int64_t kx = cols.begin; kx < cols.end; ++kx) {
          float* dx = image + ((start_y + ky * d.dh) * d.in_w + start_x + kx * d.dw) * d.batch;
          const uint8_t tap = static_cast<uint8_t>(ky * d.kw + kx);
#pragma omp simd
          for (int64_t n = 0; n < d.batch; ++n) dx[n] += tap_of[n] == tap ? grad[n] : 0.0f;
        }
      }
    }
  }
}

// The taps of an average window inside the image, and what their sum is multiplied by.
struct AvgWindow {
  TapRange rows, cols;  // pixels of the image
  float factor;
};

AvgWindow AvgWindowAt(const PoolDims& d, int64_t oy, int64_t ox, bool count_include_pad,
                      int64_t divisor) {
  const int64_t y = oy * d.sh - d.ph, x = ox * d.sw - d.pw;
  const int64_t y_end = Min(y + d.kh, d.in_h + d.ph), x_end = Min(x + d.kw, d.in_w + d.pw);
  const int64_t padded = (y_end - y) * (x_end - x);
  const TapRange rows = {Max(y, 0), Max(Max(y, 0), Min(y_end, d.in_h))};
  const TapRange cols = {Max(x, 0), Max(Max(x, 0), Min(x_end, d.in_w))};
  const int64_t inside = (rows.end - rows.begin) * (cols.end - cols.begin);
  const int64_t taps = divisor != 0 ? divisor : count_include_pad ? padded : inside;
  return {rows, cols, inside == 0 ? 0.0f : static_cast<float>(1.0 / static_cast<double>(taps))};
}

void AvgRow(const AvgPoolArgs& args, int64_t channel, int64_t oy) {
  const PoolDims& d = args.dims;
  const float* image = args.x + channel * d.in_h * d.in_w * d.batch;
  for (int64_t ox = 0; ox < d.out_w; ++ox) {
    const AvgWindow window = AvgWindowAt(d, oy, ox, args.count_include_pad, args.divisor);
    float* y = args.y + ((channel * d.out_h + oy) * d.out_w + ox) * d.batch;
    Zero(y, d.batch);
    for (int64_t iy = window.rows.begin; iy < window.rows.end; ++iy) {
      for (int64_t ix = window.cols.begin; ix < window.cols.end; ++ix) {
        const float* x = image + (iy * d.in_w + ix) * d.batch;
#pragma omp simd
        for (int64_t n = 0; n < d.batch; ++n) y[n] += x[n];
      }
    }
#pragma omp simd
    for (int64_t n = 0; n < d.batch; ++n) y[n] *= window.factor;
  }
}

void AvgBackwardChannel(const AvgPoolBackwardArgs& args, int64_t channel) {
  const PoolDims& d = args.dims;
  float* image = args.dx + channel * d.in_h * d.in_w * d.batch;
  Zero(image, d.in_h * d.in_w * d.batch);
  for (int64_t oy = 0; oy < d.out_h; ++oy) {
    for (int64_t ox = 0; ox < d.out_w; ++ox) {
      const AvgWindow window = AvgWindowAt(d, oy, ox, args.count_include_pad, args.divisor);
      const float* grad = args.grad + ((channel * d.out_h + oy) * d.out_w + ox) * d.batch;
      for (int64_t iy = window.rows.begin; iy < window.rows.end; ++iy) {
        for (int64_t ix = window.cols.begin; ix < window.cols.end; ++ix) {
          float* dx = image + (iy * d.in_w + ix) * d.batch;
#pragma omp simd
          for (int64_t n = 0; n < d.batch; ++n) dx[n] += grad[n] * window.factor;
        }
      }
    }
  }
}

}  // namespace

void max_pool2d(const MaxPoolArgs& args) {
  const int64_t rows = args.dims.channels * args.dims.out_h;
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t row = 0; row < rows; ++row) {
    MaxRow(args, row / args.dims.out_h, row % args.dims.out_h);
  }
}

void max_pool2d_backward(const MaxPoolBackwardArgs& args) {
  const PoolDims& d = args.dims;
  const bool stream = Streams(args.dx, d.channels * d.in_h * d.in_w, d.batch);
  const auto disjoint = stream ? DisjointBackwardChannel<true> : DisjointBackwardChannel<false>;
  const auto channel_kernel = Disjoint(d) ? disjoint : MaxBackwardChannel;
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < d.channels; ++channel) {
    channel_kernel(args, channel);
    vfence();
  }
}

void avg_pool2d(const AvgPoolArgs& args) {
  const int64_t rows = args.dims.channels * args.dims.out_h;
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t row = 0; row < rows; ++row) {
    AvgRow(args, row / args.dims.out_h, row % args.dims.out_h);
  }
}

void avg_pool2d_backward(const AvgPoolBackwardArgs& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t channel = 0; channel < args.dims.channels; ++channel) {
    AvgBackwardChannel(args, channel);
  }
}

}  // namespace SK_ISA
}  // namespace sk
