// Which rows a token attends to, block by block, in the canonical order, and how partial softmaxes
// are merged: shared by all attend kernels.
#pragma once
#include <cuda_runtime.h>

#include "backends/nvidia/ops/attend.h"

namespace dsv4::nvidia {

/// A row in memory; values is null for a masked one.
struct RowRef {
  const std::byte* values;
  const std::byte* scales;
};

/// The blocks of one token. Places are positions or entries (ranges), or places of a list.
struct TokenBlocks {
  int32_t seq;
  int32_t window_begin, window_end;           // places
  int32_t window_blocks;                      // of chain 0, counted from window_begin
  int32_t compressed_begin, compressed_end;   // places
  int32_t compressed_first, compressed_last;  // blocks [first, last)
  int32_t num_chains;                         // at least 1
};

/// Blocks of one chain: window blocks first, then compressed blocks from compressed_first.
struct ChainBlocks {
  int32_t window_blocks;
  int32_t compressed_first;
  int32_t count;  // of both
};

__device__ __forceinline__ int32_t div_up(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}

/// kRowsPerBlock, if not 0, is known to be args.rows_per_block: divisions become shifts.
template <int kRowsPerBlock = 0>
__device__ __forceinline__ TokenBlocks token_blocks(const AttendArgs& args, int32_t token) {
  TokenBlocks out{};
  const auto places = [&](const RowSource& rows, int32_t& begin, int32_t& end) {
    if (rows.kind == RowSource::kNone) return;
    begin = rows.kind == RowSource::kRange ? __ldg(rows.begin + token) : 0;
    end = __ldg(rows.end + token);
  };
  places(args.window, out.window_begin, out.window_end);
  places(args.compressed, out.compressed_begin, out.compressed_end);
  if (args.token_to_seq != nullptr) out.seq = __ldg(args.token_to_seq + token);
  const int32_t rows = kRowsPerBlock > 0 ? kRowsPerBlock : args.rows_per_block;
  if (out.window_begin < out.window_end) {
    out.window_blocks = div_up(out.window_end - out.window_begin, rows);
  }
  if (out.compressed_begin < out.compressed_end) {
    out.compressed_first = out.compressed_begin / rows;
    out.compressed_last = div_up(out.compressed_end, rows);
  }
  out.num_chains = max(1, div_up(out.compressed_last, args.blocks_per_chain));
  return out;
}

/// Chain `chain` of [0, num_chains); count is 0 for later ones.
__device__ __forceinline__ ChainBlocks chain_blocks(const AttendArgs& args,
                                                    const TokenBlocks& token, int32_t chain) {
  ChainBlocks out;
  out.window_blocks = chain == 0 ? token.window_blocks : 0;
  out.compressed_first = max(token.compressed_first, chain * args.blocks_per_chain);
  const int32_t last = min(token.compressed_last, (chain + 1) * args.blocks_per_chain);
  out.count = out.window_blocks + max(0, last - out.compressed_first);
  return out;
}

/// The place of row 0 of a chain's block.
__device__ __forceinline__ int32_t first_place(const AttendArgs& args, const TokenBlocks& token,
                                               const ChainBlocks& chain, int32_t block_idx) {
  if (block_idx < chain.window_blocks) {
    return token.window_begin + block_idx * args.rows_per_block;
  }
  return (chain.compressed_first + block_idx - chain.window_blocks) * args.rows_per_block;
}

/// The physical block and the row in it of a place, or -1 when the place is masked.
/// `first` is the first place of the block, `begin` and `end` the token's places.
struct RowSlot {
  int32_t block, row;
};
__device__ __forceinline__ RowSlot row_slot(const RowSource& rows, const TokenBlocks& token,
                                            int32_t token_idx, int32_t place, int32_t begin,
                                            int32_t end) {
  if (place < begin || place >= end) return {-1, 0};
  if (rows.kind == RowSource::kRange) {
    const int32_t logical = place / rows.rows_per_block;
    const int32_t column = logical < rows.columns ? logical : logical % rows.columns;
    return {__ldg(rows.table + token.seq * rows.table_stride + column),
            place - logical * rows.rows_per_block};
  }
  const int32_t slot = __ldg(rows.slots + token_idx * rows.slots_stride + place);
  if (slot < 0) return {-1, 0};
  const int32_t block = slot / rows.rows_per_block;
  return {block, slot - block * rows.rows_per_block};
}

__device__ __forceinline__ RowRef row_address(const RowSource& rows, RowSlot slot) {
  if (slot.block < 0) return {nullptr, nullptr};
  const std::byte* page = rows.base + slot.block * rows.block_stride_bytes;
  return {page + int64_t{slot.row} * rows.value_bytes,
          page + int64_t{rows.rows_per_block} * rows.value_bytes +
              int64_t{slot.row} * rows.scale_bytes};
}

/// The same in two steps, for kernels that look ahead: the load of a block number or slot, and what
/// follows from it.
struct RowPlace {
  int32_t loaded;  // kRange: physical block; kList: slot; negative: masked
  int32_t row;     // kRange: row of the block
};
__device__ __forceinline__ RowPlace place_of_chain(const AttendArgs& args, const TokenBlocks& token,
                                                   const ChainBlocks& chain, int32_t token_idx,
                                                   int32_t block_idx, int32_t row_idx) {
  const bool window = block_idx < chain.window_blocks;
  const RowSource& rows = window ? args.window : args.compressed;
  const int32_t place = first_place(args, token, chain, block_idx) + row_idx;
  if (place < (window ? token.window_begin : token.compressed_begin) ||
      place >= (window ? token.window_end : token.compressed_end)) {
    return {-1, 0};
  }
  if (rows.kind == RowSource::kList) {
    return {__ldg(rows.slots + token_idx * rows.slots_stride + place), 0};
  }
  const int32_t logical = place / rows.rows_per_block;
  const int32_t column = logical < rows.columns ? logical : logical % rows.columns;
  return {__ldg(rows.table + token.seq * rows.table_stride + column),
          place - logical * rows.rows_per_block};
}
__device__ __forceinline__ RowRef row_address(const RowSource& rows, RowPlace place) {
  if (place.loaded < 0) return {nullptr, nullptr};
  if (rows.kind == RowSource::kRange) return row_address(rows, RowSlot{place.loaded, place.row});
  const int32_t block = place.loaded / rows.rows_per_block;
  return row_address(rows, RowSlot{block, place.loaded - block * rows.rows_per_block});
}

/// Row `row_idx` of block `block_idx` of a chain.
__device__ __forceinline__ RowSlot slot_of_chain(const AttendArgs& args, const TokenBlocks& token,
                                                 const ChainBlocks& chain, int32_t token_idx,
                                                 int32_t block_idx, int32_t row_idx) {
  const int32_t place = first_place(args, token, chain, block_idx) + row_idx;
  if (block_idx < chain.window_blocks) {
    return row_slot(args.window, token, token_idx, place, token.window_begin, token.window_end);
  }
  return row_slot(args.compressed, token, token_idx, place, token.compressed_begin,
                  token.compressed_end);
}
__device__ __forceinline__ const RowSource& source_of_chain(const AttendArgs& args,
                                                            const ChainBlocks& chain,
                                                            int32_t block_idx) {
  return block_idx < chain.window_blocks ? args.window : args.compressed;
}

// ---- partial softmaxes: maximum m and sum l in the base-2 domain, m = -inf without rows

/// Weights with which (m, l) of the chains so far and of a further one are merged; both saw rows.
/// Values become total * by_total + chain * by_chain, computed by merge_values.
struct MergeWeights {
  float max, sum, by_total, by_chain;
};
__device__ __forceinline__ MergeWeights merge_chains(float total_max, float total_sum,
                                                     float chain_max, float chain_sum) {
  const float max = fmaxf(total_max, chain_max);
  const float by_total = exp2f(total_max - max), by_chain = exp2f(chain_max - max);
  return {max, __fmaf_rn(chain_sum, by_chain, __fmul_rn(total_sum, by_total)), by_total, by_chain};
}
/// The same where either may have seen no row (sum 0): `sums`, maximum and sum, become those of
/// both.
__device__ __forceinline__ MergeWeights merge_sums(float2& sums, float2 more) {
  MergeWeights merged = {sums.x, sums.y, 1.f, 0.f};
  if (more.y != 0.f) {
    merged = sums.y != 0.f ? merge_chains(sums.x, sums.y, more.x, more.y)
                           : MergeWeights{more.x, more.y, 0.f, 1.f};
  }
  sums = make_float2(merged.max, merged.sum);
  return merged;
}
__device__ __forceinline__ float merge_values(float total, float chain, float by_total,
                                              float by_chain) {
  return __fmaf_rn(chain, by_chain, __fmul_rn(total, by_total));
}

/// Factor of the accumulated values: 1 / (sum + 2^(sink log2 e - max)). +inf takes everything.
__device__ __forceinline__ float inverse_denominator(float max, float sum, float sink) {
  constexpr double kLog2E = 1.4426950408889634074;
  if (sink == -INFINITY) return 1.0f / sum;
  const float exponent = static_cast<float>(static_cast<double>(sink) * kLog2E - max);
  if (exponent >= 127.0f) return 0.0f;  // 2^127 against a sum of at most 2^31 rows
  return 1.0f / (sum + exp2f(exponent));
}
constexpr double kLn2 = 0.69314718055994530942;

/// Natural log of the sum of exponentials, without the sink.
__device__ __forceinline__ float log_sum_exp(float max, float sum) {
  return static_cast<float>(static_cast<double>(max) * kLn2 + static_cast<double>(logf(sum)));
}
/// Largest scale q.k of a base-2 maximum.
__device__ __forceinline__ float natural_max(float max) {
  return static_cast<float>(static_cast<double>(max) * kLn2);
}

}  // namespace dsv4::nvidia
