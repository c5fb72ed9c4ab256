// The convolution launchers of one instruction set; csrc/kernels.h documents them.
#pragma once

#include "../kernels.h"
#include "../variants.h"
#include "list_cache.h"
#include "simd.h"

namespace sk {
namespace SK_ISA {

void conv2d(float* y, const float* x, const float* values, const float* bias, const int32_t* crow,
            const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
            int64_t capacity, bool relu, ListCache* cache, int threads);
void conv2d_dgrad(float* dx, const float* grad, const float* values, const int32_t* t_crow,
                  const int32_t* t_row, const int32_t* t_perm, const ConvGeometry& geometry,
                  int64_t bh, int64_t bw, int64_t capacity, ListCache* cache, int threads);
void conv2d_wgrad(float* dvalues, const float* grad, const float* x, const int32_t* crow,
                  const int32_t* col, const ConvGeometry& geometry, int64_t bh, int64_t bw,
                  int64_t capacity, ListCache* cache, int threads);

// `kernel` tells the lists of one cache apart: 0 forward, 1 and more the phases of dgrad,
// kWgradLists.
constexpr int64_t kWgradLists = -1;
SK_INLINE ListKey list_key(const ConvGeometry& g, int64_t bh, int64_t bw, int64_t kernel,
                           Variant variant) {
  ListKey key;
  static_assert(sizeof(g) + 5 * 8 <= sizeof(key.fields), "ListKey must hold a geometry");
  std::memcpy(key.fields, &g, sizeof(g));
  int64_t* rest = key.fields + sizeof(g) / 8;
  rest[0] = bh;
  rest[1] = bw;
  rest[2] = kernel;
  rest[3] = kLanes;  // what tells the instruction sets' plans apart
  rest[4] = int64_t(variant);
  return key;
}

// Whether lists of this key, and therefore checked indices, are in the cache.
SK_INLINE bool is_known(ListCache* cache, const ListKey& key) {
  if (!cache) return false;
  const ListLock lock(*cache);
  return cache->find(key) != nullptr;
}

// plan_print of kernels.h for the passes of a convolution.
uint64_t conv2d_print(const VariantKey& key, Variant variant);
uint64_t conv2d_wgrad_print(const VariantKey& key, Variant variant);

const SparseKernels& sparse_kernels_table();

}  // namespace SK_ISA
}  // namespace sk
