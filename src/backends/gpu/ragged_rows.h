// ragged_rows: the rows of every token as one flat list of slots with row pointers.
//
// Problem  indptr[t] = sum of the lengths before t; slots[indptr[t] + i] = slot of the i-th row of
//          t: through the block table (ranges), or as the padded list has it
// Tiling   RaggedIndptr: one block, 256 tokens at a time; RaggedFill: a block per token, lanes
//          stride over its rows
// Budget   reads and writes 4 B per listed row, 640 to 2,176 rows a token; below 1% of what
//          attention then reads for them
// Contract grids depend on the number of tokens only; lists may be empty; -1 stays
#pragma once
#include "backends/gpu/plan_rows.h"

namespace dsv4::gpu {

struct RaggedArgs {
  int32_t tokens;
  const int32_t* begin;  // [tokens] ranges; null: a list
  const int32_t* end;    // [tokens] of ranges, or lengths of lists; null: no rows
  Blocks blocks;         // of ranges; tokens_per_block counts rows
  const int32_t* token_to_seq;
  const int32_t* list;  // [tokens, list_stride]
  int64_t list_stride;
  int32_t* indptr;  // [tokens + 1]
  int32_t* slots;
};

DSV4_DEVICE int32_t ragged_length(const RaggedArgs& args, int64_t token) {
  if (args.end == nullptr) return 0;
  const int32_t length = args.end[token] - (args.begin == nullptr ? 0 : args.begin[token]);
  return length < 0 ? 0 : length;
}

struct RaggedIndptr {
  using Params = RaggedArgs;
  static constexpr int kThreads = 256;
  struct SharedStorage {
    int32_t sums[2][kThreads];
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(SharedStorage, shared);
    const int lane = thread_idx();
    int32_t before = 0;
    if (lane == 0) args.indptr[0] = 0;
    for (int32_t first = 0; first < args.tokens; first += kThreads) {
      const int32_t token = first + lane;
      int32_t sum = token < args.tokens ? ragged_length(args, token) : 0;
      int side = 0;
      shared.sums[side][lane] = sum;
      block_sync();
      for (int distance = 1; distance < kThreads; distance *= 2) {
        if (lane >= distance) sum += shared.sums[side][lane - distance];
        side ^= 1;
        shared.sums[side][lane] = sum;
        block_sync();
      }
      if (token < args.tokens) args.indptr[token + 1] = before + sum;
      before += shared.sums[side][kThreads - 1];
      block_sync();  // the next tokens overwrite the sums
    }
  }
};

struct RaggedFill {
  using Params = RaggedArgs;
  static constexpr int kThreads = 128;

  DSV4_DEVICE static void run(const Params& args) {
    const int64_t token = block_idx();
    const int32_t length = ragged_length(args, token);
    int32_t* to = args.slots + args.indptr[token];
    if (args.begin == nullptr) {
      const int32_t* from = args.list + token * args.list_stride;
      for (int32_t i = thread_idx(); i < length; i += kThreads) to[i] = from[i];
      return;
    }
    const int32_t sequence = args.token_to_seq[token], begin = args.begin[token];
    for (int32_t i = thread_idx(); i < length; i += kThreads) {
      to[i] = static_cast<int32_t>(
          ExpandPlan::slot_of(args.blocks, sequence, begin + i, args.blocks.tokens_per_block));
    }
  }
};

}  // namespace dsv4::gpu
