// The linear launchers, and the table of all sparse launchers of this instruction set. A linear
// layer is also a convolution of one pixel by one tap: blocks without kernels of their own take
// those.
#include "conv2d.h"
#include "linear_product.h"
#include "linear_wgrad.h"

namespace sk {
namespace SK_ISA {
namespace {

ConvGeometry one_pixel(int64_t rows, int64_t cols, int64_t batch) {
  return {batch, 1, 1, 1, 1, rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1};
}

// Blocks of one column and 1, 2 or 4n whole rows have kernels of their own; any other takes those
// of the convolutions.
bool is_column(int64_t rows, int64_t bh, int64_t bw) {
  return bw == 1 && rows % bh == 0 && (bh <= 2 || bh % 4 == 0);
}

// Weights that dgrad's own kernel gathers: 1 MB.
constexpr int64_t kGathered = 256 * 1024;

// What a ListCache keeps apart.
enum { kForward = 1, kDgrad, kWgrad };

// Whether a product reads the pattern's lines as they are; else it takes the lists of the
// convolutions.
bool takes_lines(const VariantKey& key, Variant variant) {
  const bool gathers = key.pass == Pass::kLinearDgrad;
  if (gathers ? key.bh * key.bw != 1 : !is_column(key.g.out_channels, key.bh, key.bw)) return false;
  if (variant == Variant::kLists) return false;
  // The weights are gathered in the order of columns, each from another line of memory: dear where
  // the values leave the second-level cache. The lists of the convolutions have no such order.
  const bool dear = gathers && key.capacity > kGathered;
  return !dear || variant == Variant::kLines;
}

int band_log(Variant variant) {
  return (variant == Variant::kFewerBands) - (variant == Variant::kMoreBands);
}

uint64_t plan_print(const VariantKey& key, Variant variant) {
  if (key.pass == Pass::kConv2dWgrad) return conv2d_wgrad_print(key, variant);
  if (key.pass == Pass::kConv2d || key.pass == Pass::kConv2dDgrad)
    return conv2d_print(key, variant);
  if (!takes_lines(key, variant)) return 1;
  return mix_print(2, band_log(variant));
}

Lines lines_of(const int32_t* starts, const int32_t* index, int64_t count, int64_t bound,
               Variant variant) {
  Lines lines{};
  lines.starts = starts;
  lines.index = index;
  lines.count = count;
  lines.bound = bound;
  lines.band_log = band_log(variant);
  return lines;
}

void linear(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
            int64_t capacity, int64_t batch, bool relu, ListCache* cache, int threads) {
  const VariantKey key{Pass::kLinear, one_pixel(rows, cols, batch), bh, bw, capacity};
  const Variant variant = find_variant(key);
  if (!takes_lines(key, variant)) {
    conv2d(y, x, values, bias, crow, col, one_pixel(rows, cols, batch), bh, bw, capacity, relu,
           cache, threads);
    return;
  }
  LinearProduct p{lines_of(crow, col, rows / bh, cols, variant),
                  y,
                  x,
                  values,
                  bias,
                  nullptr,
                  batch,
                  cols,
                  bh,
                  relu};
  check_lines(p.lines, {"crow_indices", "col_indices", crow, col, nullptr, rows / bh, cols},
              capacity, cache, kForward, threads);
  if (batch > 0) run_linear(p, cache, kForward, threads);
}

void linear_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, int64_t rows, int64_t cols,
                  int64_t bh, int64_t bw, int64_t capacity, int64_t batch, ListCache* cache,
                  int threads) {
  const VariantKey key{Pass::kLinearDgrad, one_pixel(rows, cols, batch), bh, bw, capacity};
  const Variant variant = find_variant(key);
  if (!takes_lines(key, variant)) {
    conv2d_dgrad(dx, grad, values, t_crow, t_row, t_perm, one_pixel(rows, cols, batch), bh, bw,
                 capacity, cache, threads);
    return;
  }
  LinearProduct p{lines_of(t_crow, t_row, cols, rows, variant),
                  dx,
                  grad,
                  values,
                  nullptr,
                  t_perm,
                  batch,
                  rows,
                  1,
                  false};
  check_lines(p.lines, {"t_crow", "t_row", t_crow, t_row, t_perm, cols, rows}, capacity, cache,
              kDgrad, threads);
  if (batch > 0) run_linear(p, cache, kDgrad, threads);
}

void linear_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, int64_t rows, int64_t cols, int64_t bh, int64_t bw,
                  int64_t capacity, int64_t batch, ListCache* cache, int threads) {
  const VariantKey key{Pass::kLinearWgrad, one_pixel(rows, cols, batch), bh, bw, capacity};
  const Variant variant = find_variant(key);
  if (!takes_lines(key, variant)) {
    conv2d_wgrad(dvalues, grad, x, crow, col, one_pixel(rows, cols, batch), bh, bw, capacity, cache,
                 threads);
    return;
  }
  LinearWgrad w{lines_of(crow, col, rows / bh, cols, variant), dvalues, grad, x, batch, bh};
  check_lines(w.lines, {"crow_indices", "col_indices", crow, col, nullptr, rows / bh, cols},
              capacity, cache, kForward, threads);
  const int64_t stored = w.lines.entries() * bh;
  zero_floats(dvalues + stored, capacity * bh - stored);
  if (batch > 0) {
    run_linear_wgrad(w, cache, kWgrad, threads);
  } else {
    zero_floats(dvalues, stored);
  }
}

}  // namespace

const SparseKernels& sparse_kernels_table() {
  static const SparseKernels table = {linear,       linear_dgrad, linear_wgrad, conv2d,
                                      conv2d_dgrad, conv2d_wgrad, plan_print};
  return table;
}

}  // namespace SK_ISA
}  // namespace sk
