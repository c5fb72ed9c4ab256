// Variants of the sparse products: what kernel serves a product and how it is cut, where a
// measurement overruled the built-in rule (sparse_kernels.tune).
//
// Each choice of the rules in csrc/cpu (product_plan.cpp, wgrad_plan.cpp, conv2d.cpp, linear.cpp)
// has variants that make it differently, one choice at a time. A process-wide table says which
// variant a problem takes; a launcher reads it once per call. An empty table, the state at import,
// costs one load.
//
// Variants may add the terms of a sum in another order: results agree to rounding, not to the last
// bit. None depends on the number of threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace sk {

// The products of kernels.h.
enum class Pass { kConv2d, kConv2dDgrad, kConv2dWgrad, kLinear, kLinearDgrad, kLinearWgrad, kEnd };

// Name, meaning. What a variant says nothing about is left to the rule.
#define SK_VARIANTS(X)                                                         \
  X(Rule, "rule")                /* what costs and thresholds say */           \
  X(Image, "image")              /* image rows as they are, not flattened */   \
  X(Flat, "flat")                /* flattened, however large the slab */       \
  X(PixelBlocks, "pixel-blocks") /* gathered, one block of pixels at a time */ \
  X(LongRows, "long-rows")       /* gathered, one output row at a time */      \
  X(ScatterRows, "scatter-rows") /* scattered from a packed slab */            \
  X(Scatter, "scatter")          /* scattered, nothing packed */               \
  X(OneVector, "one-vector")     /* of the batch per pixel */                  \
  X(TwoVectors, "two-vectors")   /* the same, two */                           \
  X(FourVectors, "four-vectors") /* the same, four */                          \
  X(OneBand, "one-band")         /* all channels and taps at once */           \
  X(FewerBands, "fewer-bands")   /* half as many bands as the rule has */      \
  X(MoreBands, "more-bands")     /* twice as many */                           \
  X(HalfSlab, "half-slab")       /* half the output pixels per slab */         \
  X(DoubleSlab, "double-slab")   /* twice as many */                           \
  X(HalfTiles, "half-tiles")     /* half the output pixels per tile */         \
  X(DoubleTiles, "double-tiles") /* twice as many */                           \
  X(Lines, "lines")              /* a linear layer's own kernels */            \
  X(Lists, "lists")              /* a linear layer by the kernels of convolutions */

enum class Variant {
#define SK_VARIANT(id, name) k##id,
  SK_VARIANTS(SK_VARIANT)
#undef SK_VARIANT
      kEnd
};

// What a variant is chosen for. A linear layer is a convolution of one pixel by one tap. `capacity`
// as in kernels.h; it stands for the density.
struct VariantKey {
  Pass pass;
  ConvGeometry g;
  int64_t bh, bw, capacity;
};

// The variant of `key`, kRule where there is none. Of several entries that differ in nothing but
// the capacity the nearest counts, if it lies within a factor of kCapacityReach: a mask update
// moves densities a little. Safe to call while another thread sets variants.
constexpr double kCapacityReach = 1.25;
Variant find_variant(const VariantKey& key);
// kRule is an entry like any other: a problem measured and left to the rule takes no neighbour's
// variant. Whether the variant applies is the caller's to check.
void set_variant(const VariantKey& key, Variant variant);
void clear_variants();
// Entries that are not kRule.
int64_t count_variants();

// Adds a field to a number that tells plans apart.
uint64_t mix_print(uint64_t print, int64_t field);

}  // namespace sk
