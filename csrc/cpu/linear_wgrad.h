// linear_wgrad for blocks of one column, see linear_wgrad.cpp.
#pragma once

#include "linear_bands.h"

namespace sk {
namespace SK_ISA {

// dvalues[e * line_rows + r] = dot(grad row line * line_rows + r, x row index[e]), for every entry
// e of every line. line_rows is 1, 2 or a multiple of 4.
struct LinearWgrad {
  Lines lines;
  float* dvalues;
  const float *grad, *x;
  int64_t batch, line_rows;
};

// `kernel` tells the products of one cache apart. Results do not depend on `threads`.
void run_linear_wgrad(LinearWgrad& w, ListCache* cache, int64_t kernel, int threads);

}  // namespace SK_ISA
}  // namespace sk
