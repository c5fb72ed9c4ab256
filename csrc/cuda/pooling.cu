// Max and average pooling. A thread computes neighbouring batch elements of one pixel, of the
// output in the forward pass and of the input in the backward pass, which gathers: no atomics, and
// sums in a fixed order.
#include <cmath>

#include "cuda/dense.cuh"

namespace sk::cuda {
namespace {

// PoolDims in 32 bits, of one channel.
struct Pool {
  int batch, in_h, in_w, out_h, out_w, kh, kw, sh, sw, ph, pw, dh, dw;
  __host__ __device__ int InPoints() const { return in_h * in_w * batch; }
  __host__ __device__ int OutPoints() const { return out_h * out_w * batch; }
};

// The output pixel along one axis whose tap `tap` reads input pixel `at`; -1 if none does.
__device__ __forceinline__ int WindowOf(int at, int tap, int stride, int padding, int dilation,
                                        int windows) {
  const int from = at + padding - tap * dilation;
  if (from < 0 || from % stride != 0) return -1;
  return from / stride < windows ? from / stride : -1;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    MaxPoolKernel(T* __restrict__ y, uint8_t* __restrict__ argmax, const T* __restrict__ x,
                  Pool p) {
  const int64_t channel = blockIdx.x;
  const T* image = x + channel * p.InPoints();
  for (int64_t i = FirstElement<kWidth>(); i < p.OutPoints(); i += ElementStep<kWidth>()) {
    const int pixel = static_cast<int>(i) / p.batch, n = static_cast<int>(i) % p.batch;
    const int top = pixel / p.out_w * p.sh - p.ph, left = pixel % p.out_w * p.sw - p.pw;
    float best[kWidth];
    int taps[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      best[j] = -INFINITY;
      taps[j] = kNoTap;
    }
    for (int ky = 0; ky < p.kh; ++ky) {
      const int row = top + ky * p.dh;
      if (row < 0 || row >= p.in_h) continue;
      for (int kx = 0; kx < p.kw; ++kx) {
        const int column = left + kx * p.dw;
        if (column < 0 || column >= p.in_w) continue;
        float v[kWidth];
        Load<kWidth>(v, image + ((static_cast<int64_t>(row) * p.in_w + column) * p.batch + n));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          // The first tap wins over nothing, a greater value over what there was, a NaN always.
          const bool better = taps[j] == kNoTap || v[j] > best[j] || v[j] != v[j];
          best[j] = better ? v[j] : best[j];
          taps[j] = better ? ky * p.kw + kx : taps[j];
        }
      }
    }
    Store<kWidth>(y + (channel * p.OutPoints() + i), best);
    StoreTaps<kWidth>(argmax + (channel * p.OutPoints() + i), taps);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    MaxPoolGradientKernel(T* __restrict__ dx, const T* __restrict__ grad,
                          const uint8_t* __restrict__ argmax, Pool p) {
  const int64_t channel = blockIdx.x;
  for (int64_t i = FirstElement<kWidth>(); i < p.InPoints(); i += ElementStep<kWidth>()) {
    const int pixel = static_cast<int>(i) / p.batch, n = static_cast<int>(i) % p.batch;
    float sum[kWidth] = {};
    for (int ky = 0; ky < p.kh; ++ky) {
      const int oy = WindowOf(pixel / p.in_w, ky, p.sh, p.ph, p.dh, p.out_h);
      if (oy < 0) continue;
      for (int kx = 0; kx < p.kw; ++kx) {
        const int ox = WindowOf(pixel % p.in_w, kx, p.sw, p.pw, p.dw, p.out_w);
        if (ox < 0) continue;
        const int64_t at =
            channel * p.OutPoints() + (static_cast<int64_t>(oy) * p.out_w + ox) * p.batch + n;
        int taps[kWidth];
        float g[kWidth];
        LoadTaps<kWidth>(taps, argmax + at);
        Load<kWidth>(g, grad + at);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] += taps[j] == ky * p.kw + kx ? g[j] : 0.0f;
      }
    }
    Store<kWidth>(dx + (channel * p.InPoints() + i), sum);
  }
}

// What an average divides by.
struct Divisor {
  bool count_include_pad;
  float factor;  // 1 / divisor_override, or 0: counted
  __device__ float operator()(const Pool& p, int oy, int ox) const {
    if (factor != 0.0f) return factor;
    const int top = oy * p.sh - p.ph, left = ox * p.sw - p.pw;
    const int around_h = count_include_pad ? p.ph : 0, around_w = count_include_pad ? p.pw : 0;
    const int rows = min(top + p.kh, p.in_h + around_h) - max(top, -around_h);
    const int columns = min(left + p.kw, p.in_w + around_w) - max(left, -around_w);
    return 1.0f / static_cast<float>(rows * columns);
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    AvgPoolKernel(T* __restrict__ y, const T* __restrict__ x, Pool p, Divisor divisor) {
  const int64_t channel = blockIdx.x;
  const T* image = x + channel * p.InPoints();
  for (int64_t i = FirstElement<kWidth>(); i < p.OutPoints(); i += ElementStep<kWidth>()) {
    const int pixel = static_cast<int>(i) / p.batch, n = static_cast<int>(i) % p.batch;
    const int oy = pixel / p.out_w, ox = pixel % p.out_w;
    const int top = oy * p.sh - p.ph, left = ox * p.sw - p.pw;
    float sum[kWidth] = {};
    for (int row = max(top, 0); row < min(top + p.kh, p.in_h); ++row) {
      for (int column = max(left, 0); column < min(left + p.kw, p.in_w); ++column) {
        float v[kWidth];
        Load<kWidth>(v, image + ((static_cast<int64_t>(row) * p.in_w + column) * p.batch + n));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] += v[j];
      }
    }
    // A window outside of the image, which ceil_mode can make, has no sum to divide.
    const bool inside = top < p.in_h && left < p.in_w;
    const float factor = inside ? divisor(p, oy, ox) : 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] *= factor;
    Store<kWidth>(y + (channel * p.OutPoints() + i), sum);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kDenseThreads)
    AvgPoolGradientKernel(T* __restrict__ dx, const T* __restrict__ grad, Pool p, Divisor divisor) {
  const int64_t channel = blockIdx.x;
  const T* from = grad + channel * p.OutPoints();
  for (int64_t i = FirstElement<kWidth>(); i < p.InPoints(); i += ElementStep<kWidth>()) {
    const int pixel = static_cast<int>(i) / p.batch, n = static_cast<int>(i) % p.batch;
    float sum[kWidth] = {};
    for (int ky = 0; ky < p.kh; ++ky) {
      const int oy = WindowOf(pixel / p.in_w, ky, p.sh, p.ph, 1, p.out_h);
      if (oy < 0) continue;
      for (int kx = 0; kx < p.kw; ++kx) {
        const int ox = WindowOf(pixel % p.in_w, kx, p.sw, p.pw, 1, p.out_w);
        if (ox < 0) continue;
        float g[kWidth];
        Load<kWidth>(g, from + ((static_cast<int64_t>(oy) * p.out_w + ox) * p.batch + n));
        const float factor = divisor(p, oy, ox);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] += g[j] * factor;
      }
    }
    Store<kWidth>(dx + (channel * p.InPoints() + i), sum);
  }
}

// -- launchers
// -------------------------------------------------------------------------------------

Pool InInts(const PoolDims& d) {
  const auto as = [](int64_t value) { return static_cast<int>(value); };
  return {as(d.batch), as(d.in_h), as(d.in_w), as(d.out_h), as(d.out_w), as(d.kh), as(d.kw),
          as(d.sh),    as(d.sw),   as(d.ph),   as(d.pw),    as(d.dh),    as(d.dw)};
}

struct Call {
  DenseCall what;
  int64_t points;  // that threads go through, per channel
  bool wide;
};

// Checks sizes; `points` of the side that is written.
Call Prepare(const char* name, const PoolArgs& a, int64_t written, int64_t read) {
  const PoolDims& d = a.dims;
  const Call call = {
      {name, d.channels, written, a.element, a.place.device},
      written,
      Wide(a.element, d.batch, a.to, a.from) && reinterpret_cast<uintptr_t>(a.argmax) % 4 == 0};
  ServeDense(call.what);
  // Every pixel that a window can name, and every window, in 32 bits.
  const int64_t sides[] = {d.in_h + 2 * d.ph + d.kh * d.dh, d.in_w + 2 * d.pw + d.kw * d.dw,
                           d.out_h * d.sh, d.out_w * d.sw};
  bool fits = read <= kMaxElements && d.kh * d.kw <= kMaxElements;
  for (const int64_t side : sides) fits = fits && side <= INT32_MAX / 2;
  if (!fits)
    throw std::invalid_argument(call.what() +
                                ": expected images, windows and strides of less than 2^30 pixels");
  return call;
}

int64_t InPoints(const PoolDims& d) { return d.in_h * d.in_w * d.batch; }
int64_t OutPoints(const PoolDims& d) { return d.out_h * d.out_w * d.batch; }

// Calls run(T(), constant of the width, shape of the launch), unless there is nothing to write.
template <typename Run>
void Spread(const Call& call, const PoolArgs& a, Run run) {
  if (call.points == 0 || a.dims.channels == 0) return;
  DeviceGuard guard(a.place.device, call.what);
  const LaunchShape shape =
      DenseShape(a.dims.channels, call.points, call.wide ? 4 : 1, a.place.stream);
  ForType(a.element, [&](auto element) {
    if (call.wide) return run(element, std::integral_constant<int, 4>(), shape);
    run(element, std::integral_constant<int, 1>(), shape);
  });
}

Divisor DivisorOf(const PoolArgs& a) {
  const double divisor = static_cast<double>(a.divisor);
  return {a.count_include_pad, a.divisor == 0 ? 0.0f : static_cast<float>(1.0 / divisor)};
}

}  // namespace

void max_pool(const PoolArgs& a) {
  const Call call = Prepare("max_pool2d", a, OutPoints(a.dims), InPoints(a.dims));
  Spread(call, a, [&](auto element, auto width, const LaunchShape& shape) {
    using T = decltype(element);
    Launch(call.what, MaxPoolKernel<T, decltype(width)::value>, shape, static_cast<T*>(a.to),
           a.argmax, static_cast<const T*>(a.from), InInts(a.dims));
  });
}

void max_pool_backward(const PoolArgs& a) {
  const Call call = Prepare("max_pool2d_backward", a, InPoints(a.dims), OutPoints(a.dims));
  Spread(call, a, [&](auto element, auto width, const LaunchShape& shape) {
    using T = decltype(element);
    Launch(call.what, MaxPoolGradientKernel<T, decltype(width)::value>, shape,
           static_cast<T*>(a.to), static_cast<const T*>(a.from),
           static_cast<const uint8_t*>(a.argmax), InInts(a.dims));
  });
}

void avg_pool(const PoolArgs& a) {
  const Call call = Prepare("avg_pool2d", a, OutPoints(a.dims), InPoints(a.dims));
  Spread(call, a, [&](auto element, auto width, const LaunchShape& shape) {
    using T = decltype(element);
    Launch(call.what, AvgPoolKernel<T, decltype(width)::value>, shape, static_cast<T*>(a.to),
           static_cast<const T*>(a.from), InInts(a.dims), DivisorOf(a));
  });
}

void avg_pool_backward(const PoolArgs& a) {
  const Call call = Prepare("avg_pool2d_backward", a, InPoints(a.dims), OutPoints(a.dims));
  Spread(call, a, [&](auto element, auto width, const LaunchShape& shape) {
    using T = decltype(element);
    Launch(call.what, AvgPoolGradientKernel<T, decltype(width)::value>, shape,
           static_cast<T*>(a.to), static_cast<const T*>(a.from), InInts(a.dims), DivisorOf(a));
  });
}

}  // namespace sk::cuda
