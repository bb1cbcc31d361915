// Step metadata and plain row moves: expand_plan, map_slots, gather_rows, zero.
//
// Tiling    expand_plan: a lane per token; map_slots: a lane per entry; rows: a block per row part,
//           16 bytes a lane where rows are aligned
// Contract  integers: the same results as the CPU's by construction. Row sizes count bytes
#pragma once
#include "backends/gpu/platform.h"

namespace dsv4::gpu {

/// A paged cache seen by sequences (BlockTable).
struct Blocks {
  const int32_t* table;
  int64_t stride;
  int32_t columns, tokens_per_block;
};

DSV4_DEVICE bool is_aligned_to_16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// ---- expand_plan (dispatch.md 5.2, 5.3, 5.6)

struct RatioArrays {
  int32_t ratio;
  int64_t* slot_mapping;
  int32_t* begin;
  int32_t* end;
};

struct ExpandPlanArgs {
  static constexpr int kMaxRatios = 8;
  int32_t tokens, seqs, sliding_window;
  const int32_t* query_start;
  const int32_t* context_len;
  Blocks window_blocks, growing_blocks;
  int32_t* positions;
  int32_t* token_to_seq;
  int64_t* window_slot_mapping;
  int32_t* window_begin;
  int32_t* window_end;
  int32_t num_ratios;
  RatioArrays ratios[kMaxRatios];
};

struct ExpandPlan {
  using Params = ExpandPlanArgs;
  static constexpr int kThreads = 128;

  /// Slot of row `row` of a sequence where a block holds `rows_per_block` rows; -1 without a block.
  DSV4_DEVICE static int64_t slot_of(const Blocks& blocks, int32_t sequence, int32_t row,
                                     int32_t rows_per_block) {
    const int32_t logical = row / rows_per_block;
    const int64_t block = blocks.table[sequence * blocks.stride + logical % blocks.columns];
    return block < 0 ? -1 : block * rows_per_block + (row - logical * rows_per_block);
  }

  /// The sequence of a token: the last one that starts at or before it (empty ones come before).
  DSV4_DEVICE static int32_t sequence_of(const Params& args, int32_t token) {
    int32_t low = 0, high = args.seqs;  // query_start[low] <= token < query_start[high]
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (args.query_start[middle] <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  DSV4_DEVICE static void run(const Params& args) {
    const auto t = static_cast<int32_t>(block_idx() * kThreads + thread_idx());
    if (t >= args.tokens) return;
    const bool used = args.seqs > 0 && t < args.query_start[args.seqs];
    const int32_t sequence = used ? sequence_of(args, t) : 0;
    const int32_t position =
        used ? args.context_len[sequence] + (t - args.query_start[sequence]) : 0;
    args.positions[t] = position;
    args.token_to_seq[t] = sequence;
    // Tokens after the last sequence: nothing is written or seen, addresses stay legal.
    args.window_slot_mapping[t] =
        used ? slot_of(args.window_blocks, sequence, position, args.window_blocks.tokens_per_block)
             : -1;
    const int32_t begin = position - args.sliding_window + 1;
    args.window_begin[t] = begin < 0 ? 0 : begin;
    args.window_end[t] = used ? position + 1 : 0;
    for (int i = 0; i < args.num_ratios; ++i) {
      const RatioArrays& ratio = args.ratios[i];
      const int32_t entries = used ? (position + 1) / ratio.ratio : 0;
      const bool emits = used && (position + 1) % ratio.ratio == 0;
      ratio.slot_mapping[t] = emits ? slot_of(args.growing_blocks, sequence, entries - 1,
                                              args.growing_blocks.tokens_per_block / ratio.ratio)
                                    : -1;
      ratio.begin[t] = 0;
      ratio.end[t] = entries;
    }
  }
};

// ---- map_slots

struct MapSlotsArgs {
  const int32_t* entries;  // [tokens, count]
  int64_t entries_stride;
  int32_t* slots;
  int64_t slots_stride;
  const int32_t* token_to_seq;
  Blocks blocks;
  int32_t rows_per_block, count, blocks_per_token;
};

/// Local entry numbers of the selection -> global slots of the compressed cache; -1 stays.
struct MapSlots {
  using Params = MapSlotsArgs;
  static constexpr int kThreads = 128;
  static constexpr int kLaneEntries = 4;  // 16 bytes
  static constexpr int kBlockEntries = kThreads * kLaneEntries;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    const uint32_t token = block / static_cast<uint32_t>(args.blocks_per_token);
    const uint32_t part = block - token * static_cast<uint32_t>(args.blocks_per_token);
    const int begin = static_cast<int>(part) * kBlockEntries + kLaneEntries * thread_idx();
    const int32_t* entries = args.entries + token * args.entries_stride;
    int32_t* slots = args.slots + token * args.slots_stride;
    const int32_t* table = args.blocks.table + args.token_to_seq[token] * args.blocks.stride;
    if (begin + kLaneEntries <= args.count && is_aligned_to_16(entries) &&
        is_aligned_to_16(slots)) {
      auto four = load_as<Words<kLaneEntries>>(entries + begin);
      DSV4_UNROLL
      for (int i = 0; i < kLaneEntries; ++i) {
        four.word[i] =
            static_cast<uint32_t>(slot_of(args, table, static_cast<int32_t>(four.word[i])));
      }
      store_as(slots + begin, four);
      return;
    }
    for (int i = begin; i < begin + kLaneEntries && i < args.count; ++i)
      slots[i] = slot_of(args, table, entries[i]);
  }

  DSV4_DEVICE static int32_t slot_of(const Params& args, const int32_t* table, int32_t entry) {
    if (entry < 0) return -1;
    const int32_t logical = entry / args.rows_per_block;
    const int32_t column = logical < args.blocks.columns ? logical : logical % args.blocks.columns;
    return table[column] * args.rows_per_block + (entry - logical * args.rows_per_block);
  }
};

// ---- rows of bytes

/// Copies `bytes` between two places by the lanes of a block, a part of it each block.
template <int kThreads, typename Move>
DSV4_DEVICE void for_row_bytes(int64_t bytes, int64_t part, int64_t parts, bool aligned,
                               Move move) {
  const int64_t step = parts * kThreads;
  int64_t begin = 0;
  if (aligned) {
    const int64_t words = bytes / 16;
    for (int64_t w = part * kThreads + thread_idx(); w < words; w += step)
      move(16 * w, std::integral_constant<int, 16>{});
    begin = 16 * words;
  }
  for (int64_t b = begin + part * kThreads + thread_idx(); b < bytes; b += step)
    move(b, std::integral_constant<int, 1>{});
}

struct GatherRowsArgs {
  const uint8_t* x;
  int64_t x_stride_bytes;
  const int32_t* rows;  // [count]
  uint8_t* out;
  int64_t out_stride_bytes;
  int64_t row_bytes;
  int32_t blocks_per_row;
};

struct GatherRows {
  using Params = GatherRowsArgs;
  static constexpr int kThreads = 128;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    const uint32_t row = block / static_cast<uint32_t>(args.blocks_per_row);
    const uint32_t part = block - row * static_cast<uint32_t>(args.blocks_per_row);
    const uint8_t* from = args.x + args.rows[row] * args.x_stride_bytes;
    uint8_t* to = args.out + row * args.out_stride_bytes;
    for_row_bytes<kThreads>(args.row_bytes, part, args.blocks_per_row,
                            is_aligned_to_16(from) && is_aligned_to_16(to),
                            [&](int64_t at, auto size) {
                              if constexpr (size.value == 16) {
                                store_as(to + at, load_as<Words<4>>(from + at));
                              } else {
                                to[at] = from[at];
                              }
                            });
  }
};

/// Zeros of a [outer, inner] grid of rows.
struct ZeroArgs {
  uint8_t* out;
  int64_t outer_stride_bytes, inner_stride_bytes;
  int64_t row_bytes;
  int32_t inner, blocks_per_row;
};

struct Zero {
  using Params = ZeroArgs;
  static constexpr int kThreads = 128;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    const uint32_t row = block / static_cast<uint32_t>(args.blocks_per_row);
    const uint32_t part = block - row * static_cast<uint32_t>(args.blocks_per_row);
    const uint32_t outer = row / static_cast<uint32_t>(args.inner);
    const uint32_t inner = row - outer * static_cast<uint32_t>(args.inner);
    uint8_t* to = args.out + outer * args.outer_stride_bytes + inner * args.inner_stride_bytes;
    for_row_bytes<kThreads>(args.row_bytes, part, args.blocks_per_row, is_aligned_to_16(to),
                            [&](int64_t at, auto size) {
                              if constexpr (size.value == 16) {
                                store_as(to + at, Words<4>{});
                              } else {
                                to[at] = 0;
                              }
                            });
  }
};

}  // namespace dsv4::gpu
