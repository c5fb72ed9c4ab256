// The launchers of a pattern change on a GPU, each for all layers of a network at once. No torch.
//
// Common to all of them:
//   layers      described one by one on the host; pointers in the descriptions are addresses of GPU
//               `place.device`, owned by the caller. Descriptions travel to the GPU as parameters
//               of a kernel: nothing is copied from host memory that a stream could still wait for.
//   workspace   asked for and passed in, as CUB has it: a call with Scratch::memory null queues
//               nothing and returns the bytes wanted, the same for equal layers. 16-byte aligned.
//   sizes       known to the host or read from GPU memory by kernels: nothing is waited for,
//   nothing
//               allocated. Of each layer fewer than 2^31 - 2^16 blocks and entries, and of all
//               layers' entries together.
//   keys        int64, block_row * block_cols + block_col, strictly increasing; trusted.
//   order       equal calls give equal bits, on every GPU.
//   errors      as kernels_cuda.h says.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cuda.h"

namespace sk::cuda {

struct Scratch {
  void* memory;
  int64_t bytes;
};

enum class Score { kFloat32 = 0, kFloat64 = 1 };

// Chooses in each layer exactly `count` of the largest (or smallest) scores; ties go to the lowest
// index. -0 equals 0. With NaN the count is still exact, the choice is not specified.
struct SelectLayer {
  const void* scores;  // [size] of the Score type
  int64_t size;
  int64_t count;    // 0 to size
  uint8_t* mask;    // [size], 1 where chosen, else 0; or null
  int64_t* places;  // [count], the chosen indices, increasing; or null
};
int64_t select_top_k(const std::vector<SelectLayer>& layers, bool largest, Score score,
                     const Scratch& scratch, const Place& place);

// The keys of the blocks that stay, in order; marks them in the scores, where they cannot be grown.
struct KeepLayer {
  const uint8_t* pruned;  // [size], not 0 where a block goes
  const int64_t* keys;    // [size]
  int64_t size;
  int64_t* kept;  // [count], written
  int64_t count;  // exactly so many of `pruned` are 0; more are dropped
  void* scores;   // [blocks] of the Score type, set to -1 at the kept keys; or null
};
int64_t keep_blocks(const std::vector<KeepLayer>& layers, Score score, const Scratch& scratch,
                    const Place& place);

// The keys of two increasing lists without a common key, in order.
struct MergeLayer {
  const int64_t* kept;  // [kept_count]
  int64_t kept_count;
  const int64_t* grown;  // [grown_count]
  int64_t grown_count;
  int64_t* keys;  // [kept_count + grown_count], written
};
int64_t merge_keys(const std::vector<MergeLayer>& layers, const Scratch& scratch,
                   const Place& place);

// Both orders of a pattern, as kernels.h describes them; zero past the last stored block.
struct IndexLayer {
  const int64_t* keys;  // [count]
  int64_t count;
  int64_t block_rows;
  int64_t block_cols;
  int64_t capacity;
  int32_t* crow;    // [block_rows + 1]
  int32_t* col;     // [capacity]
  int32_t* t_crow;  // [block_cols + 1]
  int32_t* t_row;   // [capacity]
  int32_t* t_perm;  // [capacity]
};
int64_t build_index(const std::vector<IndexLayer>& layers, const Scratch& scratch,
                    const Place& place);

// Where each new block was in the old order.
struct LocateLayer {
  const int64_t* old_keys;  // [old_count]
  int64_t old_count;
  const int64_t* new_keys;  // [new_count]
  int64_t new_count;
  int32_t* source;  // [new_count], written: index into the old blocks, -1 for a new one
};
int64_t locate_blocks(const std::vector<LocateLayer>& layers, const Scratch& scratch,
                      const Place& place);

// Brings tensors of the values' shape (values, gradient, optimizer state) into the new order.
struct MoveTensor {
  const void* from;       // [old blocks or more][block]
  void* to;               // [capacity][block], written; zero past `count`. May be `from` itself
  const void* start;      // [count][block], what new blocks get; null: zero
  const int32_t* source;  // [count], of locate_blocks
  int64_t count;
  int64_t capacity;
  int64_t block_bytes;  // a multiple of 2; addresses are aligned to 2, or to 4 where it is one of 4
};
int64_t move_blocks(const std::vector<MoveTensor>& tensors, const Scratch& scratch,
                    const Place& place);

}  // namespace sk::cuda
