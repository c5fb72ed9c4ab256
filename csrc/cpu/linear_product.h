// linear and linear_dgrad for blocks of one column, see linear_product.cpp.
#pragma once

#include "linear_bands.h"

namespace sk {
namespace SK_ISA {

// y[line * line_rows + r] = sum over the line's entries e of
//   values[(perm ? perm[e] : e) * line_rows + r] * x[index[e]].
// line_rows is 1, 2 or a multiple of 4; with a perm it is 1.
struct LinearProduct {
  Lines lines;
  float* y;
  const float *x, *values, *bias;
  const int32_t* perm;  // null: the lines are in the order of the values
  int64_t batch, sources, line_rows;
  bool relu;
};

// `kernel` tells the products of one cache apart. Results do not depend on `threads`.
void run_linear(LinearProduct& p, ListCache* cache, int64_t kernel, int threads);

}  // namespace SK_ISA
}  // namespace sk
