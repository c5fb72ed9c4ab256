// Element SpMM: one warp computes one row of the output for a tile of 32 to 128 batch elements.
//
// All lanes of a warp work on the same non-zero at a time, so x is read in whole, coalesced rows
// and the index needs no divergence. The non-zeros themselves are loaded 32 at a time, one per
// lane, and handed round by shuffle. Rows of a block are neighbours and share the batch tile, so
// that rows of x that several of them need are found in L1.
#include <cuda_runtime.h>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.cuh"

namespace sk::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int64_t kMaxGridY = 65535;

// `kWidth` consecutive floats, moved in one instruction where the address allows it.
template <int kWidth>
struct Pack;
template <>
struct Pack<1> {
  using Type = float;
};
template <>
struct Pack<2> {
  using Type = float2;
};
template <>
struct Pack<4> {
  using Type = float4;
};

template <int kWidth>
__device__ __forceinline__ void Load(float (&to)[kWidth], const float* from) {
  const auto pack = __ldg(reinterpret_cast<const typename Pack<kWidth>::Type*>(from));
  const float* lanes = reinterpret_cast<const float*>(&pack);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = lanes[i];
}

template <int kWidth>
__device__ __forceinline__ void Store(float* to, const float (&from)[kWidth]) {
  typename Pack<kWidth>::Type pack;
  float* lanes = reinterpret_cast<float*>(&pack);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) lanes[i] = from[i];
  *reinterpret_cast<typename Pack<kWidth>::Type*>(to) = pack;
}

// Each lane owns kWidth consecutive batch elements; batch % kWidth == 0, so a lane is inside or
// out.
template <int kWidth>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    LinearKernel(float* __restrict__ y, const float* __restrict__ x,
                 const float* __restrict__ values, const float* __restrict__ bias,
                 const int32_t* __restrict__ crow, const int32_t* __restrict__ col, int64_t rows,
                 int64_t batch, bool relu) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= rows) return;
  const int lane = threadIdx.x;
  const int begin = crow[row], end = crow[row + 1];
  const int64_t tile_step = static_cast<int64_t>(gridDim.y) * kWarp * kWidth;
  // The grid's second dimension is bounded, so a block may have several tiles to do.
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kWarp * kWidth; tile < batch;
       tile += tile_step) {
    const int64_t n = tile + lane * kWidth;
    const bool inside = n < batch;
    float sum[kWidth] = {};
    for (int chunk = begin; chunk < end; chunk += kWarp) {
      const bool mine = chunk + lane < end;
      const float my_value = mine ? values[chunk + lane] : 0.0f;
      const int32_t my_col = mine ? col[chunk + lane] : 0;
      const int count = min(kWarp, end - chunk);
      for (int k = 0; k < count; ++k) {
        const float value = __shfl_sync(0xffffffffu, my_value, k);
        const int64_t source = __shfl_sync(0xffffffffu, my_col, k);
        if (!inside) continue;
        float from[kWidth];
        Load<kWidth>(from, x + source * batch + n);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += value * from[i];
      }
    }
    if (!inside) continue;
    const float offset = bias != nullptr ? bias[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] += offset;
      if (relu && sum[i] < 0.0f) sum[i] = 0.0f;  // not fmaxf, which would swallow NaN
    }
    Store<kWidth>(y + row * batch + n, sum);
  }
}

std::string Describe(const LinearArgs& args) {
  return "cuda_linear (rows " + std::to_string(args.rows) + ", cols " + std::to_string(args.cols) +
         ", batch " + std::to_string(args.batch) + ", device " + std::to_string(args.device) + ")";
}

// Widest pack that divides the batch and that both addresses are aligned for.
int PackWidth(const LinearArgs& args) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(args.y) | reinterpret_cast<uintptr_t>(args.x);
  // A narrow batch is better spread over all lanes than packed into a few.
  if (args.batch % 4 == 0 && args.batch > 64 && addresses % sizeof(float4) == 0) return 4;
  if (args.batch % 2 == 0 && args.batch > 32 && addresses % sizeof(float2) == 0) return 2;
  return 1;
}

template <int kWidth, typename Describe>
void LaunchLinear(Describe what, const LinearArgs& args) {
  const int64_t tiles = (args.batch + kWarp * kWidth - 1) / (kWarp * kWidth);
  const dim3 block(kWarp, kWarpsPerBlock);
  const dim3 grid(static_cast<unsigned>((args.rows + kWarpsPerBlock - 1) / kWarpsPerBlock),
                  static_cast<unsigned>(tiles < kMaxGridY ? tiles : kMaxGridY));
  Launch(what, LinearKernel<kWidth>, {grid, block, 0, args.stream}, args.y, args.x, args.values,
         args.bias, args.crow, args.col, args.rows, args.batch, args.relu);
}

}  // namespace

void linear(const LinearArgs& args) {
  const auto what = [&args] { return Describe(args); };
  if (args.rows == 0 || args.batch == 0) return;
  DeviceGuard guard(args.device, what);
  switch (PackWidth(args)) {
    case 4:
      LaunchLinear<4>(what, args);
      break;
    case 2:
      LaunchLinear<2>(what, args);
      break;
    default:
      LaunchLinear<1>(what, args);
  }
}

}  // namespace sk::cuda
