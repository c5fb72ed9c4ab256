// The launchers of batch norm.
#include "cuda/norm.cuh"

namespace sk::cuda {
namespace {

template <typename T, int kWidth>
void Forward(const DenseCall& what, const NormArgs& a) {
  const int count = static_cast<int>(a.count), channels = static_cast<int>(a.channels);
  const NormParts parts = PartsOf(a.count);
  if (a.training && count > 0)
    Launch(what, NormMomentsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream),
           a.workspace, static_cast<const T*>(a.x), count, parts.length);
  Launch(what, NormSettleKernel, OfChannels(a.channels, a.place.stream), a.mean, a.var, a.offset,
         static_cast<float*>(nullptr), a.weight, a.bias, static_cast<const float*>(a.workspace),
         channels, count, parts.length, parts.number, a.training, a.eps);
  if (count == 0) return;
  Launch(what, NormApplyKernel<T, kWidth>, DenseShape(a.channels, a.count, kWidth, a.place.stream),
         static_cast<T*>(a.y), static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
         a.weight, static_cast<const float*>(a.mean), static_cast<const float*>(a.var),
         static_cast<const float*>(a.offset), count, a.eps, a.relu);
}

template <typename T, int kWidth>
void Backward(const DenseCall& what, const NormBackwardArgs& a) {
  const int count = static_cast<int>(a.count), channels = static_cast<int>(a.channels);
  const NormParts parts = PartsOf(a.count);
  float* sums = a.workspace + 2 * a.channels;  // after the slopes
  const NormGradient<T> gradient = {static_cast<const T*>(a.grad), static_cast<const T*>(a.x),
                                    static_cast<const T*>(a.y), a.relu};
  if (count > 0)
    Launch(what, NormSumsKernel<T, kWidth>, OfParts(a.channels, parts, a.place.stream), sums,
           gradient, a.weight, a.mean, a.var, a.offset, count, parts.length, a.eps);
  Launch(what, NormSlopeKernel, OfChannels(a.channels, a.place.stream), a.dweight, a.dbias,
         a.workspace, static_cast<const float*>(sums), a.weight, a.var,
         static_cast<const float*>(nullptr), channels, count, parts.number, a.training, a.eps);
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
