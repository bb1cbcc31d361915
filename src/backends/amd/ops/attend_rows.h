// Which rows a token attends to, block by block in the canonical order (ReductionGrid, ops/ops.h),
// and how partial softmaxes are merged.
#pragma once
#include "backends/amd/instructions.h"

namespace dsv4::amd {

/// Rows of one paged cache that tokens read: a range of the sequence's own rows through a block
/// table, or a list of slots per token, padded or flat.
struct RowSource {
  enum Kind : int32_t { kNone, kRange, kList, kFlat };
  Kind kind;
  int32_t rows_per_block;  ///< any number; rows of a page and of a block table's block
  const uint8_t* base;
  int64_t block_stride_bytes;
  int32_t value_bytes;  ///< of a row in the value area of its page
  int32_t scale_bytes;  ///< of a row in the scale area behind it; 0: none
  /// kRange: row r of sequence s lies in block table[s * table_stride + r / rows_per_block %
  /// columns]; kList: slot of place i is table[token * table_stride + i], negative: no row; kFlat:
  /// table[begin[token] + i].
  const int32_t* table;
  int64_t table_stride;
  int32_t columns;
  const int32_t* begin;  ///< [T], or null: 0; kFlat: row pointers
  const int32_t* end;    ///< [T]; kList: the length; kFlat: row pointers from the second on
};

/// A row in memory; values is null for a masked one.
struct RowRef {
  const uint8_t* values;
  const uint8_t* scales;
};

struct AttendArgs {
  const uint16_t* q;  ///< bf16 [T, heads, 512]
  int64_t q_token_stride, q_head_stride;
  uint16_t* out;  ///< bf16 [T, heads, 512]
  int64_t out_token_stride, out_head_stride;
  float* lse;         ///< [T, heads], or null
  float* max_logits;  ///< [T, heads], or null
  const float* sink;  ///< [heads], or null
  const int32_t* token_to_seq;
  RowSource window, compressed;
  float scale_log2;  ///< softmax_scale * log2 e
  int32_t num_heads;
  int32_t head_tiles;  ///< blocks of the grid per token
  int32_t blocks_per_chain;
};

/// The blocks of one token: window blocks, then compressed blocks from compressed_first.
struct TokenBlocks {
  int32_t token, seq;
  int32_t window_begin, window_end;  // places
  int32_t window_first, window_blocks;
  int32_t compressed_begin, compressed_end;
  int32_t compressed_first;
  int32_t count;  // of all blocks
};

constexpr int kBlockRows = 64;

DSV4_DEVICE TokenBlocks token_blocks(const AttendArgs& args, int32_t token) {
  TokenBlocks out{};
  out.token = token;
  const auto places = [&](const RowSource& rows, int32_t& begin, int32_t& end) {
    if (rows.kind == RowSource::kNone) return;
    begin = rows.begin == nullptr ? 0 : rows.begin[token];
    end = rows.end[token];
    if (rows.kind != RowSource::kFlat) return;
    end -= begin;  // places of a list count from its start
    begin = 0;
  };
  const auto blocks = [](int32_t begin, int32_t end, int32_t& first) {
    if (begin >= end) return 0;
    first = begin / kBlockRows;
    return (end + kBlockRows - 1) / kBlockRows - first;
  };
  places(args.window, out.window_begin, out.window_end);
  places(args.compressed, out.compressed_begin, out.compressed_end);
  if (args.token_to_seq != nullptr) out.seq = args.token_to_seq[token];
  out.window_blocks = blocks(out.window_begin, out.window_end, out.window_first);
  out.count =
      out.window_blocks + blocks(out.compressed_begin, out.compressed_end, out.compressed_first);
  return out;
}

/// The chain of block `block` of a token.
DSV4_DEVICE int32_t chain_of(const AttendArgs& args, const TokenBlocks& token, int32_t block) {
  if (block < token.window_blocks) return 0;
  return (token.compressed_first + block - token.window_blocks) / args.blocks_per_chain;
}

/// What is known of a row after one load: a physical block (kRange) or slot (lists), negative where
/// the row is masked; and the row in that block.
struct RowPlace {
  int32_t loaded, row;
};

DSV4_DEVICE RowPlace place_of(const AttendArgs& args, const TokenBlocks& token, int32_t block,
                              int32_t row) {
  const bool in_window = block < token.window_blocks;
  const RowSource& rows = in_window ? args.window : args.compressed;
  const int32_t first =
      in_window ? token.window_first + block : token.compressed_first + block - token.window_blocks;
  const int32_t place = first * kBlockRows + row;
  if (place < (in_window ? token.window_begin : token.compressed_begin) ||
      place >= (in_window ? token.window_end : token.compressed_end)) {
    return {-1, 0};
  }
  if (rows.kind == RowSource::kList)
    return {rows.table[token.token * rows.table_stride + place], 0};
  if (rows.kind == RowSource::kFlat) return {rows.table[rows.begin[token.token] + place], 0};
  const int32_t logical = place / rows.rows_per_block;
  const int32_t column = logical < rows.columns ? logical : logical % rows.columns;
  return {rows.table[token.seq * rows.table_stride + column],
          place - logical * rows.rows_per_block};
}

DSV4_DEVICE RowRef address_of(const AttendArgs& args, const TokenBlocks& token, int32_t block,
                              RowPlace place) {
  if (place.loaded < 0) return {nullptr, nullptr};
  const RowSource& rows = block < token.window_blocks ? args.window : args.compressed;
  if (rows.kind != RowSource::kRange) {
    place.row = place.loaded % rows.rows_per_block;
    place.loaded = place.loaded / rows.rows_per_block;
  }
  const uint8_t* page = rows.base + place.loaded * rows.block_stride_bytes;
  return {page + int64_t{place.row} * rows.value_bytes,
          page + int64_t{rows.rows_per_block} * rows.value_bytes +
              int64_t{place.row} * rows.scale_bytes};
}

// ---- partial softmaxes: maximum m and sum l in the base-2 domain, m = -inf without rows

/// Weights with which (m, l) of the chains so far and of a further one are merged; both saw rows.
struct MergeWeights {
  float max, sum, by_total, by_chain;
};
DSV4_DEVICE MergeWeights merge_chains(float total_max, float total_sum, float chain_max,
                                      float chain_sum) {
  const float max = total_max < chain_max ? chain_max : total_max;
  const float by_total = exp2_approx(total_max - max), by_chain = exp2_approx(chain_max - max);
  return {max, gpu::fma(chain_sum, by_chain, total_sum * by_total), by_total, by_chain};
}

constexpr float kInfinity = __builtin_inff();

/// Factor of the accumulated values: 1 / (sum + 2^(sink log2 e - max)). +inf takes everything.
DSV4_DEVICE float inverse_denominator(float max, float sum, float sink) {
  constexpr double kLog2E = 1.4426950408889634074;
  if (sink == -kInfinity) return 1.0f / sum;
  const auto exponent = static_cast<float>(static_cast<double>(sink) * kLog2E - max);
  if (exponent >= 127.0f) return 0.0f;  // 2^127 against a sum of at most 2^31 rows
  return 1.0f / (sum + exp2_approx(exponent));
}
constexpr double kLn2 = 0.69314718055994530942;

/// Natural log of the sum of exponentials, without the sink.
DSV4_DEVICE float log_sum_exp(float max, float sum) {
  return static_cast<float>((static_cast<double>(max) + static_cast<double>(log2_approx(sum))) *
                            kLn2);
}
/// Largest scale q.k of a base-2 maximum.
DSV4_DEVICE float natural_max(float max) {
  return static_cast<float>(static_cast<double>(max) * kLn2);
}

}  // namespace dsv4::amd
