"""Shows that the emulated tests of the tensor-core kernels fail when a kernel is wrong: each fault
is planted into a copy of csrc, which is built and tested; the tests must fail.

    python tests/cuda_emulation/planted_mma_faults.py [WORD ...]    faults with one of the words
"""

from __future__ import annotations

import sys

from planting import BLOCKS, Fault, main

FAULTS = (
    Fault("tile: wrong lane's row of ldmatrix", "mma_tile.cuh",
          "tile.Place(m + lane % 8 + low * 8, k / kChunk<T> + high)",
          "tile.Place(m + (lane ^ 1) % 8 + low * 8, k / kChunk<T> + high)",
          "bfloat16 and b16-even and product", "mma_bfloat.cu", BLOCKS),
    Fault("tile: matrices of A swapped", "mma_tile.cuh",
          "LoadMatrices<true>(a, tile.Place(k + lane % 8 + high * 8, m / kChunk<T> + low));",
          "LoadMatrices<true>(a, tile.Place(k + lane % 8 + low * 8, m / kChunk<T> + high));",
          "bfloat16 and b16-even and wgrad", "mma_bfloat.cu", BLOCKS),
    Fault("tile: wrong lane of a TF32 fragment", "mma_tile.cuh",
          "words[i] = tile.Word(k + lane % 4 + i % 2 * 4,",
          "words[i] = tile.Word(k + lane / 8 + i % 2 * 4,", "float32 and b16-even and dgrad",
          "mma_tf32.cu", BLOCKS),
    Fault("tile: TF32 operand not rounded", "mma_tile.cuh",
          "if constexpr (sizeof(T) == 4) word = RoundToTf32(word);", "",
          "float32 and b16-even and product", "mma_tf32.cu", BLOCKS),
    Fault("tile: chunk of B off by one", "mma_tile.cuh",
          "tile.Place(n + lane % 8 + high * 8, k / kChunk<T> + low)",
          "tile.Place(n + lane % 8 + high * 8, k / kChunk<T> + low + 1)",
          "bfloat16 and b16-even and product", "mma_bfloat.cu", BLOCKS),
    Fault("tile: a partial chunk copied in whole", "mma_tile.cuh",
          "count = count < 0 ? 0 : count < kChunk<T> ? count : kChunk<T>;",
          "count = count <= 0 ? 0 : kChunk<T>;", "bfloat16 and b16-primes and product",
          "mma_bfloat.cu", BLOCKS),
    Fault("product: barrier dropped", "mma_product.cuh", "is filled next. __syncthreads();",
          "is filled next.\n", "bfloat16 and b16-wide-rows and product", "mma_bfloat.cu", BLOCKS),
    Fault("product: waits for one copy too few", "mma_product.cuh", "WaitCopies<kMmaStages - 2>();",
          "WaitCopies<kMmaStages - 1>();", "bfloat16 and b16-wide-rows and product",
          "mma_bfloat.cu", BLOCKS),
    Fault("product: fills the stage that is multiplied", "mma_product.cuh",
          "const int free = slot == 0 ? kMmaStages - 1 : slot - 1;", "const int free = slot;",
          "bfloat16 and b16-wide-rows and product", "mma_bfloat.cu", BLOCKS),
    Fault("product: last block of a stage left out", "mma_product.cuh",
          "if (walk.Next(entries[j])) ++count;",
          "if (walk.Next(entries[j]) && j < P::kItems - 1) ++count;",
          "bfloat16 and b16-wide-rows and product", "mma_bfloat.cu", BLOCKS),
    Fault("product: rows of a partial block stored", "mma_product.cuh",
          "if (o.pairs && channel < target.count) {", "if (o.pairs) {",
          "bfloat16 and b16-narrow and product", "mma_bfloat.cu", BLOCKS),
    Fault("product: points past the batch stored", "mma_product.cuh",
          "point < o.points ? lattice.Pixel(point) : -1", "lattice.Pixel(point)",
          "bfloat16 and b16-narrow and product", "mma_bfloat.cu", BLOCKS),
    Fault("product: bias of the neighbour", "mma_product.cuh", "__ldg(o.bias + column + channel)",
          "__ldg(o.bias + column + (channel ^ 1))", "bfloat16 and b16-even and product",
          "mma_bfloat.cu", BLOCKS),
    Fault("walk: one entry past the end", "mma_walk.cuh", "if (next_ >= end_) return false;",
          "if (next_ > end_) return false;", "bfloat16 and b16-even and product", "mma_bfloat.cu",
          BLOCKS),
    Fault("walk: transposed order forgotten", "mma_walk.cuh", "__ldg(index_.t_perm + next_)",
          "next_", "bfloat16 and b16-even and dgrad", "mma_bfloat.cu", BLOCKS),
    Fault("walk: groups mixed", "mma_walk.cuh", "if (w_.groups == 1) continue;",
          "if (w_.groups > 0) continue;", "bfloat16 and b16-conv-groups and dgrad", "mma_bfloat.cu",
          BLOCKS),
    Fault("window: padding off by one", "mma_window.cuh", "y >= 0 && y < w.src_h",
          "y >= 0 && y <= w.src_h", "bfloat16 and b16-conv3x3 and product", "mma_bfloat.cu",
          BLOCKS),
    Fault("window: phase of the stride forgotten", "mma_window.cuh",
          "return Rest(tap).y % w_.stride_h == 0 && Rest(tap).x % w_.stride_w == 0;",
          "return true;", "bfloat16 and b16-conv-stride2 and dgrad", "mma_bfloat.cu", BLOCKS),
    Fault("wgrad: barrier dropped", "mma_wgrad.cuh", "is filled next. __syncthreads();",
          "is filled next.\n", "bfloat16 and b16-parts and wgrad", "mma_bfloat.cu", BLOCKS),
    Fault("wgrad: a part ends one point early", "mma_wgrad.cuh",
          "begin + min(o.points - begin, o.part);", "begin + min(o.points - begin, o.part - 1);",
          "bfloat16 and b16-parts and wgrad", "mma_bfloat.cu", BLOCKS),
    Fault("wgrad: outside of a partial block not zero", "mma_wgrad.cuh",
          "const bool there = n.row + row < w.dst_group;", "const bool there = true;",
          "bfloat16 and infinities", "mma_bfloat.cu", BLOCKS),
    Fault("wgrad: tail not zeroed", "mma_wgrad.cuh", "out[i] = 0.0f;", ";",
          "bfloat16 and b16-long-tail and wgrad", "mma_bfloat.cu", BLOCKS),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(FAULTS, sys.argv[1:]))
