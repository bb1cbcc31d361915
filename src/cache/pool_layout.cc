#include "cache/pool_layout.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// Sizes of this layout are sums of validated pages; a product beyond 2^63 means absurd limits.
int64_t mul_or_fail(int64_t a, int64_t b, const char* what) {
  const std::optional<int64_t> product = checked_mul(a, b);
  if (!product) {
    fail(ErrorCode::kInvalidArgument, "cache pool: ", what, ": ", a, " x ", b,
         " bytes exceed 2^63");
  }
  return *product;
}

void check_limits(const PoolLimits& limits) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value < least) {
      fail(ErrorCode::kInvalidArgument, "cache pool: ", name, " is ", value, ", expected at least ",
           least);
    }
  };
  at_least("total_tokens", limits.total_tokens, 1);
  at_least("max_seqs", limits.max_seqs, 1);
  at_least("max_step_tokens", limits.max_step_tokens, 1);
  at_least("window_block_tokens", limits.window_block_tokens, 1);
  at_least("growing_block_tokens", limits.growing_block_tokens, 1);
  at_least("max_snapshots", limits.max_snapshots, 0);
}

bool format_fits(CacheRole role, KvFormat format) {
  switch (format) {
    case KvFormat::kFp8DsMla:
    case KvFormat::kBf16:
    case KvFormat::kFp8:
    case KvFormat::kF32:
      return role == CacheRole::kWindow || role == CacheRole::kCompressed;
    case KvFormat::kIndexFp8:
    case KvFormat::kIndexMxfp4:
    case KvFormat::kIndexF32:
      return role == CacheRole::kIndex;
    case KvFormat::kStateF32:
      return role == CacheRole::kState || role == CacheRole::kIndexState;
  }
  return false;
}

void check_spec(size_t layer, const CacheSpec& spec, const PoolLimits& limits) {
  const std::string where =
      concat("cache pool: layer ", layer, ", ", cache_role_name(spec.role), " cache: ");
  if (!format_fits(spec.role, spec.format)) {
    fail(ErrorCode::kInvalidArgument, where, "format ", kv_format_name(spec.format),
         " does not belong to this role");
  }
  check_row_elems(spec.format, spec.row_elems);
  const bool grows = spec.role == CacheRole::kCompressed || spec.role == CacheRole::kIndex;
  if (grows) {
    if (spec.keep_tokens != 0) {
      fail(ErrorCode::kInvalidArgument, where, "keep_tokens is ", spec.keep_tokens,
           ", expected 0 (grows with the sequence)");
    }
    if (spec.tokens_per_row < 1 || limits.growing_block_tokens % spec.tokens_per_row != 0) {
      fail(ErrorCode::kInvalidArgument, where, "growing_block_tokens is ",
           limits.growing_block_tokens, ", expected a multiple of ", spec.tokens_per_row,
           " tokens per row");
    }
  } else if (spec.tokens_per_row != 1 || spec.keep_tokens < 1) {
    fail(ErrorCode::kInvalidArgument, where, "tokens_per_row ", spec.tokens_per_row,
         " and keep_tokens ", spec.keep_tokens, ", expected 1 and at least 1");
  }
}

// Row numbers (slots) are 32-bit in index lists, and so are block numbers.
int32_t checked_blocks(int64_t blocks, int64_t rows_per_block, const char* group) {
  if (blocks > kMaxInt32 / rows_per_block) {
    fail(ErrorCode::kInvalidArgument, "cache pool: ", blocks, " ", group, " of ", rows_per_block,
         " rows, expected fewer than 2^31 rows (row numbers are 32-bit)");
  }
  return static_cast<int32_t>(blocks);
}

}  // namespace

PoolLayout::PoolLayout(const std::vector<std::vector<CacheSpec>>& specs, const PoolLimits& limits) {
  check_limits(limits);
  const auto place = [](int64_t& block_bytes, int64_t& offset, int64_t bytes) {
    offset = block_bytes;
    block_bytes += round_up(bytes, kPageAlignment);
  };
  int64_t max_growing_rows = 1;
  for (size_t i = 0; i < specs.size(); ++i) {
    Layer& layer = layers.emplace_back();
    for (const CacheSpec& spec : specs[i]) {
      check_spec(i, spec, limits);
      int64_t* offset = nullptr;
      int64_t* block_bytes = &growing_block_bytes;
      int64_t rows = limits.growing_block_tokens / spec.tokens_per_row;
      switch (spec.role) {
        case CacheRole::kCompressed:
          offset = &layer.compressed;
          break;
        case CacheRole::kIndex:
          offset = &layer.index;
          break;
        case CacheRole::kWindow:
          offset = &layer.window;
          block_bytes = &window_block_bytes;
          rows = limits.window_block_tokens;
          keep_tokens = std::max<int64_t>(keep_tokens, spec.keep_tokens);
          break;
        case CacheRole::kState:
        case CacheRole::kIndexState:
          offset = spec.role == CacheRole::kState ? &layer.state : &layer.index_state;
          block_bytes = &state_slot_bytes;
          rows = spec.keep_tokens;
          break;
      }
      if (*offset != kAbsent) {
        fail(ErrorCode::kInvalidArgument, "cache pool: layer ", i, " declares two ",
             cache_role_name(spec.role), " caches, expected at most one");
      }
      if (block_bytes == &growing_block_bytes) max_growing_rows = std::max(max_growing_rows, rows);
      place(*block_bytes, *offset, page_bytes(spec.format, rows, spec.row_elems));
    }
  }

  // Sequences and restore points alike hold blocks that are partly filled.
  const int64_t holders = int64_t{limits.max_seqs} + limits.max_snapshots;
  state_slots = checked_blocks(holders, 1, "state slots");

  // sum of ceil(n_i / block) over `holders` numbers n_i >= 1 that add up to total_tokens is largest
  // when all but one are a multiple plus one.
  const int64_t non_empty = std::min(holders, limits.total_tokens);
  growing_blocks =
      checked_blocks((limits.total_tokens - non_empty) / limits.growing_block_tokens + non_empty,
                     max_growing_rows, "growing blocks");

  // A sequence with n_i new tokens has keep_tokens - 1 + n_i live rows; L >= 1 consecutive rows
  // touch at most floor((L - 2) / block) + 2 blocks wherever they begin. All together:
  const int64_t block = limits.window_block_tokens;
  const int64_t worst = holders * (keep_tokens - 3 + 2 * block) + limits.max_step_tokens;
  window_blocks = checked_blocks(std::max(worst / block, holders), block, "window blocks");
}

PoolUsage PoolLayout::usage(const PoolLimits& limits) const {
  PoolUsage out;
  out.growing_blocks = out.growing_blocks_free = growing_blocks;
  out.window_blocks = out.window_blocks_free = window_blocks;
  out.state_slots = out.state_slots_free = state_slots;
  out.growing_block_bytes = growing_block_bytes;
  out.window_block_bytes = window_block_bytes;
  out.state_slot_bytes = state_slot_bytes;
  out.growing_bytes_per_token =
      static_cast<double>(growing_block_bytes) / limits.growing_block_tokens;
  for (const int64_t bytes : {mul_or_fail(growing_blocks, growing_block_bytes, "growing blocks"),
                              mul_or_fail(window_blocks, window_block_bytes, "window blocks"),
                              mul_or_fail(state_slots, state_slot_bytes, "state slots")}) {
    const std::optional<int64_t> sum = checked_add(out.bytes, bytes);
    if (!sum) fail(ErrorCode::kInvalidArgument, "cache pool: more than 2^63 bytes");
    out.bytes = *sum;
  }
  return out;
}

}  // namespace dsv4
