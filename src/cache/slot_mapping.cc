#include "cache/slot_mapping.h"

#include <cstddef>

#include "core/fail.h"

namespace dsv4 {
namespace {

int64_t length_of(std::span<const int32_t> list) {
  return static_cast<int64_t>(list.size());
}

// Ends an index list after its first `count` entries.
int32_t finish(std::span<int32_t> list, int64_t count) {
  std::fill(list.begin() + count, list.end(), -1);
  return static_cast<int32_t>(count);
}

int64_t entries_of(int64_t tokens, int64_t ratio) {
  return ratio <= 1 ? 0 : ceil_div(tokens, ratio);
}

}  // namespace

int32_t window_slots(std::span<const int32_t> block_table, int64_t block_size, int64_t position,
                     std::span<int32_t> out) {
  const int64_t first = std::max<int64_t>(0, position - length_of(out) + 1);
  for (int64_t p = first; p <= position; ++p) {
    out[static_cast<size_t>(p - first)] = static_cast<int32_t>(slot_of(block_table, p, block_size));
  }
  return finish(out, position - first + 1);
}

int32_t all_entry_numbers(int64_t position, int64_t ratio, std::span<int32_t> out) {
  const int64_t count = std::min(visible_entries(position, ratio), length_of(out));
  for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  return finish(out, count);
}

int32_t all_entry_slots(std::span<const int32_t> block_table, int64_t rows_per_block,
                        int64_t position, int64_t ratio, std::span<int32_t> out) {
  const int64_t count = std::min(visible_entries(position, ratio), length_of(out));
  for (int64_t i = 0; i < count; ++i) {
    out[static_cast<size_t>(i)] = static_cast<int32_t>(slot_of(block_table, i, rows_per_block));
  }
  return finish(out, count);
}

int32_t topk_slots(std::span<const int32_t> block_table, int64_t rows_per_block,
                   std::span<const int32_t> topk, std::span<int32_t> out) {
  DSV4_CHECK(out.size() == topk.size());
  size_t count = 0;
  for (int32_t entry : topk) {
    const int64_t slot = slot_of(block_table, entry, rows_per_block);
    if (slot >= 0) out[count++] = static_cast<int32_t>(slot);
  }
  return finish(out, static_cast<int64_t>(count));
}

BatchSplit split_batch(std::span<const int32_t> query_lens, int32_t speculative_tokens) {
  BatchSplit out;
  for (size_t i = 0; i < query_lens.size(); ++i) {
    if (query_lens[i] > 1 + speculative_tokens) {
      ++out.num_prefills;
      out.num_prefill_tokens += query_lens[i];
    } else if (out.num_prefills == 0) {
      ++out.num_decodes;
      out.num_decode_tokens += query_lens[i];
    } else {
      fail(ErrorCode::kInvalidArgument, "batch order: request ", i, " of ", query_lens[i],
           " new tokens is a decode (at most ", 1 + speculative_tokens,
           ") and follows a prefill, expected decodes first");
    }
  }
  return out;
}

PrefillArea max_prefill_area(const PrefillLimits& limits) {
  const int64_t entries = entries_of(limits.max_context, limits.ratio);
  return {entries, entries + limits.sliding_window + limits.max_batched_tokens};
}

int32_t combine_prefill_indices(const PrefillQuery& query, std::span<int32_t> out) {
  const int64_t base = query.request * query.area.rows;
  const int64_t entries = query.ratio <= 1 ? 0
                                           : std::min(visible_entries(query.position, query.ratio),
                                                      length_of(query.topk));
  const int64_t first = std::max<int64_t>(0, query.position - query.sliding_window + 1);
  const int64_t count = entries + query.position - first + 1;
  DSV4_CHECK(count <= length_of(out));
  const int64_t gather_start =
      query.seq_len - prefill_gather_len(query.query_len, query.seq_len, query.sliding_window);
  const int64_t window_base = base + query.area.compressed_rows - gather_start;
  int32_t* next = out.data();
  for (int64_t i = 0; i < entries; ++i) {
    *next++ = static_cast<int32_t>(base + query.topk[static_cast<size_t>(i)]);
  }
  for (int64_t p = first; p <= query.position; ++p) *next++ = static_cast<int32_t>(window_base + p);
  return finish(out, count);
}

std::vector<PrefillChunk> plan_prefill_chunks(std::span<const int32_t> query_lens,
                                              std::span<const int32_t> seq_lens,
                                              const PrefillLimits& limits) {
  DSV4_CHECK(query_lens.size() == seq_lens.size());
  const int64_t capacity = kPrefillChunkRequests * max_prefill_area(limits).rows;
  std::vector<PrefillChunk> out;
  int64_t entries = 0, gather = 0;  // largest of the open chunk
  for (int64_t i = 0; i < length_of(query_lens); ++i) {
    const int64_t query_len = query_lens[static_cast<size_t>(i)];
    const int64_t seq_len = seq_lens[static_cast<size_t>(i)];
    if (query_len < 1 || query_len > std::min<int64_t>(seq_len, limits.max_batched_tokens) ||
        seq_len > limits.max_context) {
      fail(ErrorCode::kInvalidArgument, "prefill request ", i, ": ", query_len,
           " new tokens of a sequence of ", seq_len, ", expected 1 to ", limits.max_batched_tokens,
           " new tokens and a sequence of at most ", limits.max_context);
    }
    const int64_t own_entries = entries_of(seq_len, limits.ratio);
    const int64_t own_gather = prefill_gather_len(query_len, seq_len, limits.sliding_window);
    const int64_t grown_entries = std::max(entries, own_entries);
    const int64_t grown_gather = std::max(gather, own_gather);
    const bool joins =
        !out.empty() && (i + 1 - out.back().begin) * (grown_entries + grown_gather) <= capacity;
    entries = joins ? grown_entries : own_entries;
    gather = joins ? grown_gather : own_gather;
    if (!joins) out.push_back({.begin = i, .end = i, .area = {}});
    out.back().end = i + 1;
    out.back().area = {entries, entries + gather};
  }
  return out;
}

}  // namespace dsv4
