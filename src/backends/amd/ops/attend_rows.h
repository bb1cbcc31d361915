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
  /// columns]. Lists: slot of place i is table[l + i], negative: no row; l is token * table_stride
  /// (kList) or begin[token] (kFlat).
  const int32_t* table;
  int64_t table_stride;
  int32_t columns;
  const int32_t* begin;  ///< [T]; kRange: first place
  const int32_t* end;    ///< [T]; kRange: one past the last place; kList: the length; kFlat: of l
};

/// A row in memory; a masked one is kZeroRow.
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
  RowSource rows[2];  ///< window, compressed
  float scale_log2;   ///< softmax_scale * log2 e
  int32_t num_heads;
  int32_t head_tiles;  ///< blocks of the grid per token
  int32_t blocks_per_chain;
};

constexpr int kBlockRows = 64;

/// What a token reads of one source. Places are positions or entries (ranges), or places of a list.
struct TokenRows {
  int32_t begin, end;  // places
  int32_t first;       // place of row 0 of the first block
  int32_t blocks;
  int64_t table;  // where the block table of its sequence, or its list, begins
};
/// The blocks of one token: those of the window, then those of the compressed rows.
struct TokenBlocks {
  TokenRows window, compressed;
  int32_t count;  // of all blocks
};

DSV4_DEVICE TokenRows token_rows(const RowSource& rows, bool window, const int32_t* token_to_seq,
                                 int32_t token) {
  TokenRows out{};
  if (rows.kind == RowSource::kNone) return out;
  out.end = rows.end[token];
  switch (rows.kind) {
    case RowSource::kRange:
      out.begin = rows.begin[token];
      out.table = token_to_seq[token] * rows.table_stride;
      break;
    case RowSource::kList:
      out.table = token * rows.table_stride;
      break;
    default:
      out.table = rows.begin[token];
      out.end -= static_cast<int32_t>(out.table);
  }
  if (out.begin >= out.end) return out;
  out.first = window ? out.begin : out.begin - out.begin % kBlockRows;
  out.blocks = (out.end - out.first + kBlockRows - 1) / kBlockRows;
  return out;
}

DSV4_DEVICE TokenBlocks token_blocks(const AttendArgs& args, int32_t token) {
  TokenBlocks out;
  out.window = token_rows(args.rows[0], true, args.token_to_seq, token);
  out.compressed = token_rows(args.rows[1], false, args.token_to_seq, token);
  out.count = out.window.blocks + out.compressed.blocks;
  return out;
}

/// One past the last block of the chain that `block` of a token belongs to; may exceed their count.
DSV4_DEVICE int32_t chain_end(const AttendArgs& args, const TokenBlocks& token, int32_t block) {
  const int32_t first = token.compressed.first / kBlockRows - token.window.blocks;  // of block 0
  if (block < token.window.blocks) {
    const int32_t end = args.blocks_per_chain - first;
    return end < token.window.blocks ? token.window.blocks : end;
  }
  return ((first + block) / args.blocks_per_chain + 1) * args.blocks_per_chain - first;
}

/// What is known of a row after one load: a physical block (kRange) or slot (lists), negative where
/// the row is masked; and the row in that block.
struct RowPlace {
  int32_t loaded, row;
};

// The source is found by its number, so that its fields are loaded where they are needed and not
// kept in registers.
DSV4_DEVICE const RowSource& source_of(const AttendArgs& args, const TokenBlocks& token,
                                       int32_t block) {
  return args.rows[block < token.window.blocks ? 0 : 1];
}

DSV4_DEVICE RowPlace place_of(const AttendArgs& args, const TokenBlocks& token, int32_t block,
                              int32_t row) {
  const bool in_window = block < token.window.blocks;
  const TokenRows& own = in_window ? token.window : token.compressed;
  const int32_t of_source = block - (in_window ? 0 : token.window.blocks);
  const int32_t place = own.first + of_source * kBlockRows + row;
  if (place < own.begin || place >= own.end) return {-1, 0};
  const RowSource& rows = source_of(args, token, block);
  if (rows.kind != RowSource::kRange) return {rows.table[own.table + place], 0};
  const int32_t logical = place / rows.rows_per_block;
  const int32_t column = logical < rows.columns ? logical : logical % rows.columns;
  return {rows.table[own.table + column], place - logical * rows.rows_per_block};
}

/// What is fetched in place of a masked row: no branch, and nothing that could be a NaN.
alignas(16) constexpr uint8_t kZeroRow[1024] = {};

DSV4_DEVICE RowRef address_of(const AttendArgs& args, const TokenBlocks& token, int32_t block,
                              RowPlace place) {
  if (place.loaded < 0) return {kZeroRow, kZeroRow};
  const RowSource& rows = source_of(args, token, block);
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
  const float max = gpu::max(total_max, chain_max);
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
