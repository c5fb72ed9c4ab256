// The launchers of kernels_cuda.h: what is served, sizes in 32 bits, which kernel.
#include <algorithm>

#include "cuda/dgrad.cuh"
#include "cuda/product.cuh"
#include "cuda/small.cuh"
#include "cuda/staged_dgrad.cuh"
#include "cuda/staged_wgrad.cuh"
#include "cuda/wgrad.cuh"

namespace sk::cuda {

// Instantiated in product_*.cu, staged_*.cu, gradients_*.cu and small_*.cu.
#define SK_SMALL_KERNELS_OF(T, Source, Target)                                                   \
  extern template void SmallProductOf<T, Source>(const CallName&, const ProductArgs&, int, int); \
  extern template void SmallDgradOf<T, Target>(const CallName&, const DgradArgs&,                \
                                               const DgradShape&);                               \
  extern template void SmallWgradOf<T, Source>(const CallName&, const WgradArgs&, int, int);
#define SK_STAGED_WGRAD_OF(T)                                                            \
  extern template void StagedWgradOf<T, LinearSource>(const CallName&, const WgradArgs&, \
                                                      const WgradShape&);                \
  extern template void StagedWgradOf<T, ConvSource>(const CallName&, const WgradArgs&,   \
                                                    const WgradShape&);
SK_STAGED_WGRAD_OF(float)
SK_STAGED_WGRAD_OF(__half)
SK_STAGED_WGRAD_OF(__nv_bfloat16)
#undef SK_STAGED_WGRAD_OF
#define SK_STAGED_KERNELS_OF(T, Source, Target)                                    \
  extern template void StagedOf<T, Source>(const CallName&, const ProductArgs&,    \
                                           const ProductShape&);                   \
  extern template void StagedDgradOf<T, Target>(const CallName&, const DgradArgs&, \
                                                const DgradShape&);
#define SK_KERNELS_OF(T)                                                               \
  SK_STAGED_KERNELS_OF(T, LinearSource, LinearTarget)                                  \
  SK_STAGED_KERNELS_OF(T, ConvSource, ConvTarget)                                      \
  extern template void ProductOf<T, LinearSource>(const CallName&, const ProductArgs&, \
                                                  const ProductShape&);                \
  extern template void ProductOf<T, ConvSource>(const CallName&, const ProductArgs&,   \
                                                const ProductShape&);                  \
  extern template void DgradOf<T, LinearTarget>(const CallName&, const DgradArgs&,     \
                                                const DgradShape&);                    \
  extern template void DgradOf<T, ConvTarget>(const CallName&, const DgradArgs&,       \
                                              const DgradShape&);                      \
  extern template void WgradOf<T, LinearSource>(const CallName&, const WgradArgs&,     \
                                                const WgradShape&);                    \
  extern template void WgradOf<T, ConvSource>(const CallName&, const WgradArgs&,       \
                                              const WgradShape&);                      \
  SK_SMALL_KERNELS_OF(T, LinearSource, LinearTarget)                                   \
  SK_SMALL_KERNELS_OF(T, ConvSource, ConvTarget)
SK_KERNELS_OF(float)
SK_KERNELS_OF(__half)
SK_KERNELS_OF(__nv_bfloat16)
#undef SK_KERNELS_OF
#undef SK_STAGED_KERNELS_OF
#undef SK_SMALL_KERNELS_OF

std::string CallName::operator()() const {
  const char* types[] = {"float32", "float16", "bfloat16"};
  const ConvGeometry& g = geometry;
  std::string text = std::string(name) + " (rows " + std::to_string(g.out_channels) + ", cols " +
                     std::to_string(g.kh * g.kw * g.in_channels / std::max<int64_t>(g.groups, 1)) +
                     ", batch " + std::to_string(g.batch);
  if (g.in_h != 1 || g.in_w != 1 || g.kh * g.kw != 1)
    text += ", image " + std::to_string(g.in_h) + "x" + std::to_string(g.in_w) + ", kernel " +
            std::to_string(g.kh) + "x" + std::to_string(g.kw);
  return text + ", block " + std::to_string(bh) + "x" + std::to_string(bw) + ", " +
         types[static_cast<int>(element)] + ", device " + std::to_string(device) + ")";
}

namespace {

// Room above every int that a kernel forms of a point.
constexpr int64_t kMaxPoints = INT32_MAX - 1024;
// Of a long sum. Parts are for GPUs that the stored blocks alone leave idle: enough warps in all
// for 132 multiprocessors with 32 each, which keeps the workspace near one copy of the values for
// large layers and under 0.6 MB beyond that for small ones.
constexpr int64_t kShortestPart = 2048, kMostParts = 64, kWantedWarps = 132 * 32;

void Serve(bool condition, const CallName& what, const char* expected) {
  if (!condition) throw std::invalid_argument(what() + ": expected " + expected);
}

int64_t OutPoints(const ConvGeometry& g) { return g.out_h * g.out_w * g.batch; }
int64_t InPoints(const ConvGeometry& g) { return g.in_h * g.in_w * g.batch; }

// A layer without an image: one pixel, one tap, nothing around it.
bool IsLinear(const ConvGeometry& g) {
  return g.in_h == 1 && g.in_w == 1 && g.out_h == 1 && g.out_w == 1 && g.kh == 1 && g.kw == 1 &&
         g.pad_top == 0 && g.pad_left == 0 && g.groups == 1;
}

void ServeGeometry(const ConvGeometry& g, const CallName& what) {
  Serve(what.bh >= 1 && what.bh <= kMaxBlockHeight, what, "a block height of 1 to 32");
  Serve(OutPoints(g) <= kMaxPoints && InPoints(g) <= kMaxPoints, what,
        "fewer than 2^31 - 1024 pixels x batch per channel");
  Serve(g.out_channels <= kMaxPoints && g.in_channels * g.kh * g.kw <= kMaxPoints, what,
        "fewer than 2^31 - 1024 rows and columns");
  Serve((g.kh - 1) * g.dil_h < 32768 && (g.kw - 1) * g.dil_w < 32768, what,
        "a dilated kernel of at most 32768 pixels a side");
  const int64_t sides[] = {g.in_h + g.pad_top + g.pad_bottom, g.in_w + g.pad_left + g.pad_right,
                           g.stride_h, g.stride_w};
  Serve(*std::max_element(sides, sides + 4) <= INT32_MAX / 2, what,
        "a padded image and strides of less than 2^30");
}

int BlockRows(const ConvGeometry& g, int64_t bh) {
  return static_cast<int>((g.out_channels / g.groups + bh - 1) / bh * g.groups);
}

// Points that a lane may move at once: 4, 2 or 1.
int Width(const ConvGeometry& g, Element element, const void* a, const void* b) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  const uintptr_t bytes = element == Element::kFloat32 ? 4 : 2;
  if (g.batch % 4 == 0 && addresses % (4 * bytes) == 0) return 4;
  return g.batch % 2 == 0 && addresses % (2 * bytes) == 0 ? 2 : 1;
}

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct WgradParts {
  int64_t length, count;
};
WgradParts CutPoints(const ConvGeometry& g, int64_t bh, int64_t capacity, Variant variant) {
  // Of the staged kernel two thread blocks fit on a multiprocessor.
  const int64_t wanted = variant == Variant::kStaged ? 132 * 2 : kWantedWarps;
  const int64_t there =
      variant == Variant::kStaged ? StagedWgradBlocks(g, bh) : Ceil(capacity, WgradBlocks(bh));
  const int64_t most = std::min(kMostParts, Ceil(wanted, std::max<int64_t>(1, there)));
  const int64_t points = OutPoints(g);
  const int64_t length = Ceil(std::max(Ceil(points, most), kShortestPart), 128) * 128;
  return {length, std::max<int64_t>(1, Ceil(points, length))};
}

// Bytes that rows of grad and x can be copied at a time by the staged kernel, 16 or 4; 0: by none.
int64_t WgradCopies(const WgradArgs& a) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.grad);
  const int64_t size = a.element == Element::kFloat32 ? 4 : 2;
  for (const int64_t bytes : {16, 4})
    if (a.geometry.batch * size % bytes == 0 && addresses % bytes == 0) return bytes;
  return 0;
}

// Calls `run` with a value of the element's type.
template <typename Run>
void ForElement(Element element, Run run) {
  if (element == Element::kFloat32) return run(float());
  if (element == Element::kFloat16) return run(__half());
  run(__nv_bfloat16());
}

// Whether rows of activations at these addresses can be staged (staged.cuh, staged_dgrad.cuh).
bool CanStage(const ConvGeometry& g, Element element, const void* a, const void* b) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  const int64_t per_copy = element == Element::kFloat32 ? 4 : 8;
  return g.groups == 1 && g.batch % per_copy == 0 && addresses % 16 == 0;
}

bool IsWide(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

void small(const CallName& what, const ProductArgs& a, int points) {
  const int block_rows = BlockRows(a.geometry, a.bh);
  ForElement(a.element, [&](auto element) {
    using T = decltype(element);
    if (IsLinear(a.geometry)) return SmallProductOf<T, LinearSource>(what, a, block_rows, points);
    SmallProductOf<T, ConvSource>(what, a, block_rows, points);
  });
}

}  // namespace

std::string why_unusable(int device) {
  const auto what = [device] { return "CUDA kernels on device " + std::to_string(device); };
  try {
    DeviceGuard guard(device, what);
    cudaFuncAttributes attributes;  // loads the kernel: fails where there is no code for the device
    Check(cudaFuncGetAttributes(&attributes, AddPartsKernel), "cudaFuncGetAttributes", what);
  } catch (const std::runtime_error& error) {
    (void)cudaGetLastError();  // so that the next launch does not report it
    return error.what();
  }
  return "";
}

void product(const char* name, const ProductArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = {name, g, a.bh, a.element, a.place.device};
  ServeGeometry(g, what);
  if (g.out_channels == 0 || OutPoints(g) == 0) return;
  DeviceGuard guard(a.place.device, what);
  const int points = static_cast<int>(OutPoints(g));
  const ProductShape shape = {BlockRows(g, a.bh), points, Width(g, a.element, a.x, a.y),
                              IsWide(a.values, a.col)};
  if (a.variant == Variant::kStaged)
    Serve(a.bh <= 16 && CanStage(g, a.element, a.x, a.y), what,
          "one group, blocks of at most 16 rows, and a batch and addresses that are multiples of "
          "16 bytes for the staged kernel");
  if (a.variant == Variant::kSmall)
    Serve(points <= kSmallPoints, what, "at most 16 pixels x batch for the small-batch kernel");
  const bool few = points <= kSmallPoints;
  if (few && (a.variant == Variant::kChosen || a.variant == Variant::kSmall))
    return small(what, a, points);
  ForElement(a.element, [&](auto element) {
    using T = decltype(element);
    const bool linear = IsLinear(g);
    if (a.variant == Variant::kStaged && linear) return StagedOf<T, LinearSource>(what, a, shape);
    if (a.variant == Variant::kStaged) return StagedOf<T, ConvSource>(what, a, shape);
    if (linear) return ProductOf<T, LinearSource>(what, a, shape);
    ProductOf<T, ConvSource>(what, a, shape);
  });
}

void dgrad(const char* name, const DgradArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = {name, g, a.bh, a.element, a.place.device};
  ServeGeometry(g, what);
  if (g.in_channels == 0 || InPoints(g) == 0) return;
  DeviceGuard guard(a.place.device, what);
  const DgradShape shape = {
      static_cast<int>(g.in_channels),   static_cast<int>(g.out_channels / g.groups),
      static_cast<int>(InPoints(g)),     static_cast<int>(OutPoints(g)),
      Width(g, a.element, a.dx, a.grad), IsWide(a.t_row, a.t_perm)};
  if (a.variant == Variant::kStaged)
    Serve(g.stride_h == 1 && g.stride_w == 1 && CanStage(g, a.element, a.dx, a.grad), what,
          "one group, strides of 1, and a batch and addresses that are multiples of 16 bytes for "
          "the staged kernel");
  if (a.variant == Variant::kSmall)
    Serve(shape.in_points <= kSmallPoints, what,
          "at most 16 pixels x batch for the small-batch kernel");
  const bool few = shape.in_points <= kSmallPoints &&
                   (a.variant == Variant::kChosen || a.variant == Variant::kSmall);
  ForElement(a.element, [&](auto element) {
    using T = decltype(element);
    const bool linear = IsLinear(g), staged = a.variant == Variant::kStaged;
    if (few && linear) return SmallDgradOf<T, LinearTarget>(what, a, shape);
    if (few) return SmallDgradOf<T, ConvTarget>(what, a, shape);
    if (staged && linear) return StagedDgradOf<T, LinearTarget>(what, a, shape);
    if (staged) return StagedDgradOf<T, ConvTarget>(what, a, shape);
    if (linear) return DgradOf<T, LinearTarget>(what, a, shape);
    DgradOf<T, ConvTarget>(what, a, shape);
  });
}

int64_t wgrad_workspace(const ConvGeometry& g, int64_t bh, int64_t capacity, Variant variant) {
  const int64_t parts = CutPoints(g, bh, capacity, variant).count;
  return parts <= 1 ? 0 : parts * capacity * bh * static_cast<int64_t>(sizeof(float));
}

void wgrad(const char* name, const WgradArgs& a) {
  const ConvGeometry& g = a.geometry;
  const CallName what = {name, g, a.bh, a.element, a.place.device};
  ServeGeometry(g, what);
  Serve(a.capacity <= kMaxPoints, what, "fewer than 2^31 - 1024 stored blocks");
  if (a.capacity == 0) return;
  const int64_t bytes = wgrad_workspace(g, a.bh, a.capacity, a.variant);
  if (a.workspace_bytes < bytes)
    throw std::invalid_argument(what() + ": expected a workspace of at least " +
                                std::to_string(bytes) + " bytes (wgrad_workspace), got " +
                                std::to_string(a.workspace_bytes));
  const int64_t points = OutPoints(g), copies = WgradCopies(a);
  const bool staged = a.variant == Variant::kStaged && g.out_channels > 0 && g.in_channels > 0;
  if (a.variant == Variant::kStaged)
    Serve(g.groups == 1 && copies > 0 && StagedWgradBlocks(g, a.bh) <= kMaxPoints, what,
          "one group, and a batch and addresses that are multiples of 4 bytes for the staged "
          "kernel");
  if (a.variant == Variant::kSmall)
    Serve(points <= kSmallPoints, what, "at most 16 pixels x batch for the small-batch kernel");
  DeviceGuard guard(a.place.device, what);
  const WgradParts cut = CutPoints(g, a.bh, a.capacity, a.variant);
  const WgradShape shape = {BlockRows(g, a.bh),
                            static_cast<int>(a.capacity),
                            static_cast<int>(points),
                            Width(g, a.element, a.x, a.grad),
                            static_cast<int>(cut.length),
                            static_cast<int>(cut.count),
                            copies == 16};
  const bool few =
      points <= kSmallPoints && (a.variant == Variant::kChosen || a.variant == Variant::kSmall);
  ForElement(a.element, [&](auto element) {
    using T = decltype(element);
    if (staged && IsLinear(g)) return StagedWgradOf<T, LinearSource>(what, a, shape);
    if (staged) return StagedWgradOf<T, ConvSource>(what, a, shape);
    if (few && IsLinear(g))
      return SmallWgradOf<T, LinearSource>(what, a, shape.block_rows, shape.points);
    if (few) return SmallWgradOf<T, ConvSource>(what, a, shape.block_rows, shape.points);
    if (IsLinear(g)) return WgradOf<T, LinearSource>(what, a, shape);
    WgradOf<T, ConvSource>(what, a, shape);
  });
}

}  // namespace sk::cuda
