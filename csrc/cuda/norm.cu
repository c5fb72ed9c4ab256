// The launchers of batch norm.
#include <algorithm>

#include "cuda/norm.cuh"

namespace sk::cuda {
namespace {

// Parts of a channel, a function of its length alone.
struct Parts {
  int length, number;
};
Parts PartsOf(int64_t count) {
  const int64_t shortest = 4096, most = 64;
  const int64_t length = (std::max((count + most - 1) / most, shortest) + 1023) / 1024 * 1024;
  return {static_cast<int>(length), static_cast<int>((count + length - 1) / length)};
}

int64_t FloatBytes(int64_t count) { return count * static_cast<int64_t>(sizeof(float)); }

void ServeWorkspace(const DenseCall& what, int64_t expected, int64_t got) {
  if (got >= expected) return;
  throw std::invalid_argument(what() + ": expected a workspace of at least " +
                              std::to_string(expected) + " bytes, got " + std::to_string(got));
}

LaunchShape OfChannels(int64_t channels, void* stream) {
  const int64_t blocks = (channels + kDenseThreads - 1) / kDenseThreads;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kDenseThreads), 0, stream};
}

LaunchShape OfParts(int64_t channels, const Parts& parts, void* stream) {
  return {dim3(static_cast<unsigned>(channels), static_cast<unsigned>(parts.number)),
          dim3(kDenseThreads), 0, stream};
}

template <typename T, int kWidth>
void Forward(const DenseCall& what, const NormArgs& a) {
  const int count = static_cast<int>(a.count), channels = static_cast<int>(a.channels);
  const Parts parts = PartsOf(a.count);
  if (a.training && count > 0)
    Launch(what, NormMomentsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream),
           a.workspace, static_cast<const T*>(a.x), count, parts.length);
  Launch(what, NormSettleKernel, OfChannels(a.channels, a.place.stream), a.mean, a.var, a.offset,
         a.weight, a.bias, static_cast<const float*>(a.workspace), channels, count, parts.length,
         parts.number, a.training, a.eps);
  if (count == 0) return;
  Launch(what, NormApplyKernel<T, kWidth>, DenseShape(a.channels, a.count, kWidth, a.place.stream),
         static_cast<T*>(a.y), static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
         a.weight, static_cast<const float*>(a.mean), static_cast<const float*>(a.var),
         static_cast<const float*>(a.offset), count, a.eps, a.relu);
}

template <typename T, int kWidth>
void Backward(const DenseCall& what, const NormBackwardArgs& a) {
  const int count = static_cast<int>(a.count), channels = static_cast<int>(a.channels);
  const Parts parts = PartsOf(a.count);
  float* sums = a.workspace + 2 * a.channels;  // after the slopes
  const NormGradient<T> gradient = {static_cast<const T*>(a.grad), static_cast<const T*>(a.x),
                                    static_cast<const T*>(a.y), a.relu};
  if (count > 0)
    Launch(what, NormSumsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream), sums,
           gradient, a.weight, a.mean, a.var, a.offset, count, parts.length, a.eps);
  Launch(what, NormSlopeKernel, OfChannels(a.channels, a.place.stream), a.dweight, a.dbias,
         a.workspace, static_cast<const float*>(sums), a.weight, a.var, channels, count,
         parts.number, a.training, a.eps);
  if (count == 0) return;
  Launch(what, NormGradientKernel<T, kWidth>,
         DenseShape(a.channels, a.count, kWidth, a.place.stream), static_cast<T*>(a.dx),
         static_cast<T*>(a.dresidual), gradient, static_cast<const float*>(a.workspace), a.weight,
         a.mean, a.var, a.offset, count, a.eps);
}

}  // namespace

int64_t norm_workspace(int64_t channels, int64_t count, bool training) {
  return training ? FloatBytes(3 * channels * PartsOf(count).number) : 0;
}

int64_t norm_backward_workspace(int64_t channels, int64_t count) {
  return FloatBytes(channels * (2 + 3 * PartsOf(count).number));
}

void norm(const NormArgs& a) {
  const DenseCall what = {"batch_norm", a.channels, a.count, a.element, a.place.device};
  ServeDense(what);
  ServeWorkspace(what, norm_workspace(a.channels, a.count, a.training), a.workspace_bytes);
  if (a.channels == 0) return;
  DeviceGuard guard(a.place.device, what);
  const bool wide = Wide(a.element, a.count, a.y, a.x, a.residual);
  ForType(a.element, [&](auto element) {
    using T = decltype(element);
    if (wide) return Forward<T, 4>(what, a);
    Forward<T, 1>(what, a);
  });
}

void norm_backward(const NormBackwardArgs& a) {
  const DenseCall what = {"batch_norm_backward", a.channels, a.count, a.element, a.place.device};
  ServeDense(what);
  ServeWorkspace(what, norm_backward_workspace(a.channels, a.count), a.workspace_bytes);
  if (a.channels == 0) return;
  DeviceGuard guard(a.place.device, what);
  const bool wide = Wide(a.element, a.count, a.dx, a.dresidual, a.grad, a.x, a.y);
  ForType(a.element, [&](auto element) {
    using T = decltype(element);
    if (wide) return Backward<T, 4>(what, a);
    Backward<T, 1>(what, a);
  });
}

}  // namespace sk::cuda
