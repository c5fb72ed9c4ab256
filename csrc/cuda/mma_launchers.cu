// The launchers of kernels_mma.h: what is served, sizes in 32 bits, which kernel.
#include <algorithm>

#include "cuda/mma_product.cuh"
#include "cuda/mma_wgrad.cuh"

namespace sk::cuda {

// Instantiated in mma_bfloat.cu, mma_half.cu and mma_tf32.cu.
#define SK_BLOCK_KERNELS(T, B)                                                                     \
  extern template void BlockProductOf<T, B, RowWalk>(const CallName&, const ProductOperands<T>&,   \
                                                     const RowWalk::Index&, const Window&, void*); \
  extern template void BlockProductOf<T, B, ColumnWalk>(                                           \
      const CallName&, const ProductOperands<T>&, const ColumnWalk::Index&, const Window&, void*); \
  extern template void BlockWgradOf<T, B>(const CallName&, const BlockWgradArgs&, const Window&,   \
                                          int, bool);
SK_BLOCK_KERNELS(float, 16)
SK_BLOCK_KERNELS(float, 32)
SK_BLOCK_KERNELS(__half, 16)
SK_BLOCK_KERNELS(__half, 32)
SK_BLOCK_KERNELS(__nv_bfloat16, 16)
SK_BLOCK_KERNELS(__nv_bfloat16, 32)
#undef SK_BLOCK_KERNELS

namespace {

// Room above every int that a kernel forms of a point or a channel.
constexpr int64_t kMostPoints = INT32_MAX - 65536;

void Serve(bool condition, const CallName& what, const char* expected) {
  if (!condition) throw std::invalid_argument(what() + ": expected " + expected);
}

CallName Named(const char* name, const ConvGeometry& g, int64_t block, Element element,
               const Place& place) {
  return {name, g, block, element, place.device, block};
}

int64_t OutPoints(const ConvGeometry& g) { return g.batch * g.out_h * g.out_w; }
int64_t InPoints(const ConvGeometry& g) { return g.batch * g.in_h * g.in_w; }

bool IsMultiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

void ServeBlocks(const ConvGeometry& g, int64_t block, const CallName& what) {
  Serve(block == 16 || block == 32, what, "blocks of 16 x 16 or 32 x 32");
  Serve(OutPoints(g) <= kMostPoints && InPoints(g) <= kMostPoints, what,
        "fewer than 2^31 - 65536 pixels x batch");
  Serve(g.out_channels <= kMostPoints && g.in_channels * g.kh * g.kw <= kMostPoints &&
            (g.in_channels + g.out_channels) * g.stride_h * g.stride_w <= kMostPoints,
        what, "fewer than 2^31 - 65536 rows, columns, and channels x stride x stride");
  // Rows and columns of pixels stay below 2^30, which marks points that are in no image.
  const int64_t sides[] = {g.in_h + g.pad_top + g.pad_bottom,
                           g.in_w + g.pad_left + g.pad_right,
                           g.stride_h,
                           g.stride_w,
                           g.kh * g.dil_h,
                           g.kw * g.dil_w};
  Serve(*std::max_element(sides, sides + 6) < INT32_MAX / 8, what,
        "a padded image, strides and a dilated kernel of less than 2^28 pixels a side");
}

int64_t Bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Whether pixels of `channels` channels in `groups` are whole chunks wherever a group begins.
bool IsWide(const void* pointer, int64_t channels, int64_t groups, Element element) {
  return IsMultiple(pointer, 16) && channels / groups * Bytes(element) % 16 == 0;
}

// Calls `run` with a value of the element's type and the block's side as a constant.
template <typename Run>
void ForKernel(Element element, int64_t block, Run run) {
  const auto of = [&](auto value) {
    if (block == 16) return run(value, std::integral_constant<int, 16>());
    run(value, std::integral_constant<int, 32>());
  };
  if (element == Element::kFloat32) return of(float());
  if (element == Element::kFloat16) return of(__half());
  of(__nv_bfloat16());
}

template <typename T>
ProductOperands<T> Operands(void* y, const void* x, const void* values, const float* bias,
                            bool relu, Element element, const Window& w, int64_t images) {
  const bool even = w.dst_group % 2 == 0 && IsMultiple(y, 2 * sizeof(T));
  return {static_cast<T*>(y),
          static_cast<const T*>(x),
          static_cast<const T*>(values),
          bias,
          static_cast<int>(images * w.lattice_h * w.lattice_w),
          relu,
          IsWide(x, w.src_channels, w.groups, element),
          even};
}

}  // namespace

void block_product(const char* name, const BlockProductArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = Named(name, g, a.block, a.element, a.place);
  ServeBlocks(g, a.block, what);
  Serve(IsMultiple(a.values, 16), what, "values at a multiple of 16 bytes");
  if (g.out_channels == 0 || OutPoints(g) == 0) return;
  DeviceGuard guard(a.place.device, what);
  const Window w = MakeWindow(g, a.block, false);
  ForKernel(a.element, a.block, [&](auto element, auto block) {
    using T = decltype(element);
    BlockProductOf<T, block, RowWalk>(
        what, Operands<T>(a.y, a.x, a.values, a.bias, a.relu, a.element, w, g.batch),
        {a.crow, a.col}, w, a.place.stream);
  });
}

void block_dgrad(const char* name, const BlockDgradArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = Named(name, g, a.block, a.element, a.place);
  ServeBlocks(g, a.block, what);
  Serve(IsMultiple(a.values, 16), what, "values at a multiple of 16 bytes");
  if (g.in_channels == 0 || InPoints(g) == 0) return;
  DeviceGuard guard(a.place.device, what);
  const Window w = MakeWindow(g, a.block, true);
  ForKernel(a.element, a.block, [&](auto element, auto block) {
    using T = decltype(element);
    BlockProductOf<T, block, ColumnWalk>(
        what, Operands<T>(a.dx, a.grad, a.values, nullptr, false, a.element, w, g.batch),
        {a.t_crow, a.t_row, a.t_perm}, w, a.place.stream);
  });
}

int64_t block_wgrad_workspace(const ConvGeometry& g, int64_t block, int64_t capacity,
                              Element element) {
  ServeBlocks(g, block, Named("block_wgrad_workspace", g, block, element, {0, nullptr}));
  const Window w = MakeWindow(g, block, false);
  int64_t parts = 1;
  ForKernel(element, block, [&](auto value, auto side) {
    parts =
        CutPoints<decltype(value), side>(int64_t(w.groups) * w.dst_blocks, capacity, OutPoints(g))
            .count;
  });
  return parts <= 1 ? 0 : parts * capacity * block * block * static_cast<int64_t>(sizeof(float));
}

void block_wgrad(const char* name, const BlockWgradArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = Named(name, g, a.block, a.element, a.place);
  ServeBlocks(g, a.block, what);
  Serve(a.capacity <= kMostPoints, what, "fewer than 2^31 - 65536 stored blocks");
  Serve(IsMultiple(a.dvalues, 16) && IsMultiple(a.workspace, 16), what,
        "dvalues and workspace at multiples of 16 bytes");
  if (a.capacity == 0) return;
  const int64_t wanted = block_wgrad_workspace(g, a.block, a.capacity, a.element);
  if (a.workspace_bytes < wanted)
    throw std::invalid_argument(what() + ": expected a workspace of at least " +
                                std::to_string(wanted) + " bytes (block_wgrad_workspace), got " +
                                std::to_string(a.workspace_bytes));
  DeviceGuard guard(a.place.device, what);
  const Window w = MakeWindow(g, a.block, false);
  const bool wide = IsWide(a.x, g.in_channels, g.groups, a.element) &&
                    IsWide(a.grad, g.out_channels, g.groups, a.element);
  ForKernel(a.element, a.block, [&](auto element, auto block) {
    BlockWgradOf<decltype(element), block>(what, a, w, static_cast<int>(OutPoints(g)), wide);
  });
}

}  // namespace sk::cuda
