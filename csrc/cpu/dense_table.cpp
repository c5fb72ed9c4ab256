// The dense launchers of this instruction set, for the dispatcher.
#include "kernels_dense.h"

namespace sk {
namespace SK_ISA {

const DenseKernels& dense_kernels_table() {
  static const DenseKernels table = {
      transpose,
      channel_sums,
      batch_norm_forward,
      batch_norm_backward,
      batch_norm_pool,
      batch_norm_pool_backward,
      max_pool2d,
      max_pool2d_backward,
      avg_pool2d,
      avg_pool2d_backward,
      dropout,
      wgrad_tiles,
      wgrad_tiles_scratch,
  };
  return table;
}

}  // namespace SK_ISA
}  // namespace sk
