// Index arithmetic against the golden vectors of spec/dispatch.md 5, 7.1 and 11.
#include "cache/slot_mapping.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

std::vector<int32_t> range(int32_t begin, int32_t end) {
  std::vector<int32_t> out(static_cast<size_t>(end - begin));
  std::iota(out.begin(), out.end(), begin);
  return out;
}
std::vector<int32_t> operator+(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST(SlotOf, IsMinusOneWhereThereIsNoRow) {
  const std::vector<int32_t> table{5, -1, 7};
  EXPECT_EQ(slot_of(table, 0, 64), 320);
  EXPECT_EQ(slot_of(table, 63, 64), 383);
  EXPECT_EQ(slot_of(table, 64, 64), -1);
  EXPECT_EQ(slot_of(table, 128, 64), 448);
  EXPECT_EQ(slot_of(table, 192, 64), -1);
  EXPECT_EQ(slot_of(table, -1, 64), -1);
  const std::vector<int32_t> far{2000000000};
  EXPECT_EQ(slot_of(far, 1, 64), int64_t{2000000000} * 64 + 1);
}

TEST(WindowSlots, Golden) {
  std::vector<int32_t> out(128);
  EXPECT_EQ(window_slots(std::vector<int32_t>{9, 3, 4, 8}, 64, 200, out), 128);
  EXPECT_EQ(out, range(201, 256) + range(256, 320) + range(512, 521));
  EXPECT_EQ(window_slots(std::vector<int32_t>{2}, 64, 5, out), 6);
  EXPECT_EQ(out, range(128, 134) + std::vector<int32_t>(122, -1));
}

TEST(WindowSlots, EdgesOfTheWindow) {
  std::vector<int32_t> out(128);
  const std::vector<int32_t> table{0, 1, 2};
  EXPECT_EQ(window_slots(table, 64, 0, out), 1);
  EXPECT_EQ(out, range(0, 1) + std::vector<int32_t>(127, -1));
  EXPECT_EQ(window_slots(table, 64, 126, out), 127);
  EXPECT_EQ(out.back(), -1);
  EXPECT_EQ(window_slots(table, 64, 127, out), 128);
  EXPECT_EQ(out, range(0, 128));
  EXPECT_EQ(window_slots(table, 64, 128, out), 128);
  EXPECT_EQ(out, range(1, 129));
}

TEST(CompressedSlot, Golden) {
  // 240 tokens are cached, 40 are new, ratio 4, blocks of 256 tokens.
  const std::vector<int32_t> table{5, 7};
  std::vector<int64_t> written;
  for (int64_t position = 240; position < 280; ++position) {
    const int64_t slot = compressed_slot(table, 256, 4, position);
    EXPECT_EQ(slot >= 0, position % 4 == 3) << position;
    if (slot >= 0) written.push_back(slot);
  }
  EXPECT_EQ(written, (std::vector<int64_t>{380, 381, 382, 383, 448, 449, 450, 451, 452, 453}));
  // Ratio 128: two rows a block.
  EXPECT_EQ(compressed_slot(table, 256, 128, 126), -1);
  EXPECT_EQ(compressed_slot(table, 256, 128, 127), 10);
  EXPECT_EQ(compressed_slot(table, 256, 128, 255), 11);
  EXPECT_EQ(compressed_slot(table, 256, 128, 383), 14);
}

TEST(AllEntries, WidthsAndCounts) {
  EXPECT_EQ(all_entries_width(4096, 128), 128);
  EXPECT_EQ(all_entries_width(131072, 128), 1024);
  EXPECT_EQ(all_entries_width(1048576, 128), 8192);
  EXPECT_EQ(all_entries_width(1, 128), 128);
  EXPECT_EQ(all_entries_width(128 * 128 + 1, 128), 256);
  std::vector<int32_t> out(128);
  EXPECT_EQ(all_entry_numbers(127, 128, out), 1);
  EXPECT_EQ(out, range(0, 1) + std::vector<int32_t>(127, -1));
  EXPECT_EQ(all_entry_numbers(126, 128, out), 0);
  EXPECT_EQ(out, std::vector<int32_t>(128, -1));
  EXPECT_EQ(all_entry_numbers(255, 128, out), 2);
  EXPECT_EQ(all_entry_numbers(128 * 1000, 128, out), 128);  // never beyond the width
  const std::vector<int32_t> table{4, 9};
  EXPECT_EQ(all_entry_slots(table, 2, 3 * 128, 128, out), 3);
  EXPECT_EQ(out, (std::vector<int32_t>{8, 9, 18}) + std::vector<int32_t>(125, -1));
}

TEST(TopkSlots, DropsWhatIsOutsideAndPacksLeft) {
  const std::vector<int32_t> table{5, -1, 7};
  const std::vector<int32_t> topk{0, 63, 64, 130, -1, 500, 128, -1};
  std::vector<int32_t> out(8);
  EXPECT_EQ(topk_slots(table, 64, topk, out), 4);
  EXPECT_EQ(out, (std::vector<int32_t>{320, 383, 450, 448, -1, -1, -1, -1}));
  std::vector<int32_t> in_place = topk;
  EXPECT_EQ(topk_slots(table, 64, in_place, in_place), 4);
  EXPECT_EQ(in_place, out);
}

TEST(SplitBatch, Golden) {
  const BatchSplit split = split_batch(std::vector<int32_t>{1, 1, 2, 5}, 1);
  EXPECT_EQ(split.num_decodes, 3);
  EXPECT_EQ(split.num_decode_tokens, 4);
  EXPECT_EQ(split.num_prefills, 1);
  EXPECT_EQ(split.num_prefill_tokens, 5);
  EXPECT_EQ(split_batch(std::vector<int32_t>{}, 0).num_decodes, 0);
  EXPECT_THROW(split_batch(std::vector<int32_t>{5, 1}, 0), Error);
}

TEST(Prefill, AreaAndWidths) {
  const PrefillArea area = max_prefill_area(
      {.max_context = 1 << 20, .max_batched_tokens = 8192, .sliding_window = 128, .ratio = 4});
  EXPECT_EQ(area.compressed_rows, 262144);
  EXPECT_EQ(area.rows, 270464);
  for (int64_t ratio : {0, 1}) {
    const PrefillArea sliding = max_prefill_area({.max_context = 1 << 20,
                                                  .max_batched_tokens = 8192,
                                                  .sliding_window = 128,
                                                  .ratio = ratio});
    EXPECT_EQ(sliding.compressed_rows, 0);
    EXPECT_EQ(sliding.rows, 8320);
  }
  EXPECT_EQ(combined_width(512, 128), 640);
  EXPECT_EQ(combined_width(1024, 128), 1152);
  EXPECT_EQ(combined_width(0, 128), 128);
  EXPECT_EQ(combined_width(8192, 128), 8320);
  EXPECT_EQ(prefill_gather_len(3, 203, 128), 130);
  EXPECT_EQ(prefill_gather_len(3, 3, 128), 3);
  EXPECT_EQ(prefill_gather_len(3, 130, 128), 130);
}

TEST(Prefill, CombineGolden) {
  const std::vector<int32_t> topk = range(0, 512);
  PrefillQuery query{.request = 1,
                     .area = {.compressed_rows = 64, .rows = 1000},
                     .ratio = 4,
                     .sliding_window = 128,
                     .query_len = 3,
                     .seq_len = 203,
                     .position = 200,
                     .topk = topk};
  std::vector<int32_t> out(640);
  EXPECT_EQ(combine_prefill_indices(query, out), 178);
  EXPECT_EQ(out, range(1000, 1050) + range(1064, 1192) + std::vector<int32_t>(462, -1));
  // A top-k shorter than what is visible bounds the list; sliding layers have no entries.
  const std::vector<int32_t> two{7, 40};
  query.topk = two;
  EXPECT_EQ(combine_prefill_indices(query, out), 130);
  EXPECT_EQ(out[0], 1007);
  EXPECT_EQ(out[1], 1040);
  EXPECT_EQ(out[2], 1064);
  query.topk = {};
  query.ratio = 0;
  query.area = {.compressed_rows = 0, .rows = 130};
  std::vector<int32_t> window(128);
  EXPECT_EQ(combine_prefill_indices(query, window), 128);
  EXPECT_EQ(window, range(130, 258));
  // First token of a fresh request: itself only.
  query = {.request = 0,
           .area = {.compressed_rows = 1, .rows = 4},
           .ratio = 4,
           .sliding_window = 128,
           .query_len = 3,
           .seq_len = 3,
           .position = 0,
           .topk = topk};
  EXPECT_EQ(combine_prefill_indices(query, out), 1);
  EXPECT_EQ(out[0], 1);
}

// What a list names must be what the gather put there: row base + e for entry e, row
// base + N + (x - gather_start) for position x.
TEST(Prefill, CombinedIndicesNameTheGatheredRows) {
  const std::vector<int32_t> topk = range(0, 512);
  std::vector<int32_t> out(640);
  for (const int64_t seq_len : {1, 4, 127, 128, 129, 300}) {
    for (const int64_t query_len : {int64_t{1}, std::min<int64_t>(seq_len, 3), seq_len}) {
      const int64_t gather = prefill_gather_len(query_len, seq_len, 128);
      const PrefillArea area{seq_len / 4, seq_len / 4 + gather};
      const int64_t request = 2;
      for (int64_t p = seq_len - query_len; p < seq_len; ++p) {
        const int32_t count = combine_prefill_indices({.request = request,
                                                       .area = area,
                                                       .ratio = 4,
                                                       .sliding_window = 128,
                                                       .query_len = query_len,
                                                       .seq_len = seq_len,
                                                       .position = p,
                                                       .topk = topk},
                                                      out);
        const int64_t entries = (p + 1) / 4, first = std::max<int64_t>(0, p - 127);
        ASSERT_EQ(count, entries + p - first + 1);
        for (int32_t i = 0; i < count; ++i) {
          const int64_t local = out[static_cast<size_t>(i)] - request * area.rows;
          ASSERT_GE(local, 0);
          ASSERT_LT(local, area.rows);
          if (i < entries) {
            ASSERT_EQ(local, i);
          } else {  // position of the gathered row
            ASSERT_EQ(local - area.compressed_rows + seq_len - gather, first + i - entries);
          }
        }
      }
    }
  }
}

TEST(Prefill, ChunksAreGreedyAndFit) {
  const PrefillLimits limits{
      .max_context = 1024, .max_batched_tokens = 256, .sliding_window = 128, .ratio = 4};
  // Area of one request 256 + 128 + 256 = 640 rows; capacity 2560.
  // Short requests: 4 tokens each, N = 1, M = 5: all in one chunk.
  std::vector<int32_t> query(50, 4), seq(50, 4);
  std::vector<PrefillChunk> chunks = plan_prefill_chunks(query, seq, limits);
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0].end, 50);
  EXPECT_EQ(chunks[0].area.compressed_rows, 1);
  EXPECT_EQ(chunks[0].area.rows, 5);
  // One long request (N = 256, gather 127 + 100): M = 483; with it only 5 fit into 2560.
  query[0] = 100, seq[0] = 1024;
  chunks = plan_prefill_chunks(query, seq, limits);
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[0].begin, 0);
  EXPECT_EQ(chunks[0].end, 5);
  EXPECT_EQ(chunks[0].area.compressed_rows, 256);
  EXPECT_EQ(chunks[0].area.rows, 483);
  EXPECT_EQ(chunks[1].begin, 5);
  EXPECT_EQ(chunks[1].end, 50);
  EXPECT_EQ(chunks[1].area.rows, 5);
  // The largest possible requests: four at a time, as the reference.
  query.assign(9, 256), seq.assign(9, 1024);
  chunks = plan_prefill_chunks(query, seq, limits);
  ASSERT_EQ(chunks.size(), 3u);
  EXPECT_EQ(chunks[0].end, 4);
  EXPECT_EQ(chunks[1].end, 8);
  EXPECT_EQ(chunks[2].end, 9);
  EXPECT_EQ(chunks[2].area.rows, 256 + 127 + 256);
  EXPECT_TRUE(plan_prefill_chunks({}, {}, limits).empty());
}

TEST(Prefill, ChunksRefuseRequestsBeyondTheLimits) {
  const PrefillLimits limits{
      .max_context = 1024, .max_batched_tokens = 256, .sliding_window = 128, .ratio = 4};
  const auto plan = [&](int32_t query_len, int32_t seq_len) {
    return plan_prefill_chunks(std::vector<int32_t>{query_len}, std::vector<int32_t>{seq_len},
                               limits);
  };
  EXPECT_EQ(plan(256, 1024).size(), 1u);
  EXPECT_THROW(plan(257, 1024), Error);
  EXPECT_THROW(plan(256, 1025), Error);
  EXPECT_THROW(plan(5, 4), Error);
  EXPECT_THROW(plan(0, 4), Error);
}

}  // namespace
}  // namespace dsv4
