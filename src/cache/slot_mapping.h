// Index arithmetic over paged caches: which row numbers ("slots") a token reads and writes, and the
// prefill workspace of FlashMLA. Pure functions on host memory: the definition that plan kernels
// are tested against. Source: spec/dispatch.md 5 and 7.1, spec/cache_layouts.md 6.
//
// A slot is block * rows_per_block + offset, where the block comes from the sequence's block table.
// Index lists hold int32 slots and end with -1 entries; slots to write are int64, -1: do not write.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/checked_math.h"

namespace dsv4 {

/// Slot of logical row `row`; -1 for a negative row, one beyond the table, or an unset block (< 0).
inline int64_t slot_of(std::span<const int32_t> block_table, int64_t row, int64_t rows_per_block) {
  if (row < 0 || row / rows_per_block >= static_cast<int64_t>(block_table.size())) return -1;
  const int64_t block = block_table[static_cast<size_t>(row / rows_per_block)];
  return block < 0 ? -1 : block * rows_per_block + row % rows_per_block;
}

// ---- window
// --------------------------------------------------------------------------------------------------

/// Slots of the rows that the token at `position` sees through its sliding window, ascending:
/// positions max(0, position - out.size() + 1) .. position. The rest of `out` becomes -1.
/// @param out  [sliding_window]. @return how many are valid: min(position + 1, out.size()).
int32_t window_slots(std::span<const int32_t> block_table, int64_t block_size, int64_t position,
                     std::span<int32_t> out);

// ---- compressed rows
// ------------------------------------------------------------------------------------------

/// Entries that the token at `position` sees: those whose last token is not after it.
constexpr int64_t visible_entries(int64_t position, int64_t ratio) {
  return (position + 1) / ratio;
}

/// Slot where the token at `position` writes its compressed row, -1 unless it ends a group of
/// `ratio` tokens. @param block_tokens  tokens of a growing block, a multiple of `ratio`.
inline int64_t compressed_slot(std::span<const int32_t> block_table, int64_t block_tokens,
                               int64_t ratio, int64_t position) {
  if ((position + 1) % ratio != 0) return -1;
  return slot_of(block_table, position / ratio, block_tokens / ratio);
}

/// Columns of an index list over all entries of a layer that attends to all of them (ratio 128):
/// ceil(max_context / ratio), rounded up to 128. Depends on limits only, so that captured graphs
/// keep their addresses.
constexpr int64_t all_entries_width(int64_t max_context, int64_t ratio) {
  return round_up(ceil_div(max_context, ratio), 128);
}

/// Entries 0 .. n-1, n = min(visible, out.size()), as slots; -1 after. @return n.
int32_t all_entry_slots(std::span<const int32_t> block_table, int64_t rows_per_block,
                        int64_t position, int64_t ratio, std::span<int32_t> out);
/// The same as entry numbers local to the sequence, as prefill wants them.
int32_t all_entry_numbers(int64_t position, int64_t ratio, std::span<int32_t> out);

/// Local entry numbers of a top-k -> slots. Entries that are -1, or whose block is outside the
/// table, are dropped and the others move left; -1 after. @param out  as long as `topk`, may be the
/// same memory. @return how many are valid.
int32_t topk_slots(std::span<const int32_t> block_table, int64_t rows_per_block,
                   std::span<const int32_t> topk, std::span<int32_t> out);

// ---- batch
// ---------------------------------------------------------------------------------------------------

/// Sizes of the decode part (first) and the prefill part of a batch.
struct BatchSplit {
  int64_t num_decodes = 0, num_decode_tokens = 0, num_prefills = 0, num_prefill_tokens = 0;
};
/// A request of at most 1 + `speculative_tokens` new tokens is a decode.
/// @throws Error kInvalidArgument when a decode follows a prefill.
BatchSplit split_batch(std::span<const int32_t> query_lens, int32_t speculative_tokens);

// ---- FlashMLA prefill: requests gathered into a bf16 workspace, then attended in one call
// --------------------

/// Requests that the reference gathers at once; fixes the workspace's area.
constexpr int64_t kPrefillChunkRequests = 4;

struct PrefillLimits {
  int64_t max_context = 0;
  int64_t max_batched_tokens = 0;
  int64_t sliding_window = 0;
  int64_t ratio = 0;  ///< 0 or 1: no compressed rows
};

/// Rows of one request in the workspace: `compressed_rows` (N) first, then window rows; `rows` (M)
/// in all.
struct PrefillArea {
  int64_t compressed_rows = 0;
  int64_t rows = 0;
};
/// For any batch within `limits`: N = ceil(max_context / ratio), M = N + window + batched tokens.
PrefillArea max_prefill_area(const PrefillLimits& limits);

/// Window rows to gather for a request: its new tokens and the window before the first of them.
constexpr int64_t prefill_gather_len(int64_t query_len, int64_t seq_len, int64_t sliding_window) {
  return query_len + std::min(seq_len - query_len, sliding_window - 1);
}

/// Columns of a combined list: compressed entries and window, rounded up to 128.
constexpr int64_t combined_width(int64_t topk, int64_t sliding_window) {
  return round_up(topk + sliding_window, 128);
}

/// One query of one request of a chunk.
struct PrefillQuery {
  int64_t request = 0;  ///< number within the chunk
  PrefillArea area;     ///< of the chunk
  int64_t ratio = 0;
  int64_t sliding_window = 0;
  int64_t query_len = 0, seq_len = 0;  ///< of the request
  int64_t position = 0;
  std::span<const int32_t> topk;  ///< local entry numbers, valid ones first
};
/// Workspace rows that the query attends to: the first min(visible entries, topk.size()) of topk,
/// then its window; -1 after. @param out  [combined_width]. @return how many are valid.
int32_t combine_prefill_indices(const PrefillQuery& query, std::span<int32_t> out);

/// Requests [begin, end) gathered together, each into `area.rows` rows.
struct PrefillChunk {
  int64_t begin = 0, end = 0;
  PrefillArea area;
};
/// Cuts a batch of prefill requests greedily: a request joins while count * M of the grown chunk
/// fits kPrefillChunkRequests areas of max_prefill_area. Each chunk has the N and M of its own
/// requests. @throws Error kInvalidArgument for a request beyond the limits.
std::vector<PrefillChunk> plan_prefill_chunks(std::span<const int32_t> query_lens,
                                              std::span<const int32_t> seq_lens,
                                              const PrefillLimits& limits);

}  // namespace dsv4
