// Per-token arrays of a step (dispatch.md 5): golden slots, ring tables, padding.
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

struct Ratio {
  int32_t ratio;
  std::vector<int64_t> slots;
  std::vector<int32_t> begin, end;
};

// Owns the arrays of a plan.
struct Plan {
  std::vector<int32_t> query_start, context_len, window_table, growing_table;
  std::vector<int32_t> positions, token_to_seq, window_begin, window_end;
  std::vector<int64_t> window_slots;
  std::vector<Ratio> ratios;
  std::vector<RatioPlan> ratio_plans;
  int32_t window_columns = 4, growing_columns = 2, window_block = 64, growing_block = 256;

  void expand(int32_t num_tokens, const std::vector<int32_t>& distinct_ratios,
              int32_t sliding_window = 128) {
    const auto count = static_cast<size_t>(num_tokens);
    positions.assign(count, -99);
    token_to_seq = window_begin = window_end = positions;
    window_slots.assign(count, -99);
    ratios.clear();
    for (int32_t ratio : distinct_ratios)
      ratios.push_back({ratio, window_slots, positions, positions});
    ratio_plans.clear();
    for (Ratio& ratio : ratios) {
      ratio_plans.push_back(
          {ratio.ratio, ratio.slots.data(), ratio.begin.data(), ratio.end.data()});
    }
    PlanView view;
    view.num_tokens = num_tokens;
    view.num_seqs = static_cast<int32_t>(context_len.size());
    view.query_start = query_start.data();
    view.context_len = context_len.data();
    view.window_blocks = {window_table.data(), window_columns, window_columns, window_block};
    view.growing_blocks = {growing_table.data(), growing_columns, growing_columns, growing_block};
    view.positions = positions.data();
    view.token_to_seq = token_to_seq.data();
    view.window_slot_mapping = window_slots.data();
    view.window_begin = window_begin.data();
    view.window_end = window_end.data();
    view.ratios = ratio_plans;
    Runner runner("portable", 2);
    runner.ops().expand_plan({.plan = view, .sliding_window = sliding_window}, runner.context());
  }
};

// 240 tokens cached, 40 new, blocks 5 and 7, ratio 4: slots 380-383, then 448-453.
TEST(ExpandPlan, GoldenCompressedSlots) {
  Plan plan;
  plan.query_start = {0, 40};
  plan.context_len = {240};
  plan.window_table = {0, 1, 2, 3};
  plan.growing_table = {5, 7};
  plan.expand(40, {4, 128});
  std::vector<int64_t> slots;
  for (size_t t = 0; t < 40; ++t) {
    EXPECT_EQ(plan.positions[t], 240 + static_cast<int32_t>(t));
    const bool emits = (plan.positions[t] + 1) % 4 == 0;
    EXPECT_EQ(plan.ratios[0].slots[t] >= 0, emits) << t;
    if (emits) slots.push_back(plan.ratios[0].slots[t]);
    EXPECT_EQ(plan.ratios[0].begin[t], 0);
    EXPECT_EQ(plan.ratios[0].end[t], (plan.positions[t] + 1) / 4);
  }
  EXPECT_EQ(slots, (std::vector<int64_t>{380, 381, 382, 383, 448, 449, 450, 451, 452, 453}));
  // Ratio 128: only position 255 emits, entry 1 = row 1 of block 5.
  for (size_t t = 0; t < 40; ++t) EXPECT_EQ(plan.ratios[1].slots[t], t == 15 ? 11 : -1);
  EXPECT_EQ(plan.ratios[1].end[14], 1);
  EXPECT_EQ(plan.ratios[1].end[15], 2);
}

// attention.md 4: rows of the window and visible entries by position.
TEST(ExpandPlan, VisibleRowsByPosition) {
  Plan plan;
  plan.query_start = {0, 2052};
  plan.context_len = {0};
  plan.window_columns = 33;
  for (int32_t i = 0; i < 33; ++i) plan.window_table.push_back(i);
  plan.growing_columns = 9;
  for (int32_t i = 0; i < 9; ++i) plan.growing_table.push_back(i);
  plan.expand(2052, {4, 128});
  struct Row {
    size_t position;
    int32_t window, entries4, entries128;
  };
  for (const Row& row : {Row{0, 1, 0, 0}, Row{2, 3, 0, 0}, Row{3, 4, 1, 0}, Row{126, 127, 31, 0},
                         Row{127, 128, 32, 1}, Row{128, 128, 32, 1}, Row{2050, 128, 512, 16},
                         Row{2051, 128, 513, 16}}) {
    EXPECT_EQ(plan.window_end[row.position] - plan.window_begin[row.position], row.window);
    EXPECT_EQ(plan.window_end[row.position], static_cast<int32_t>(row.position) + 1);
    EXPECT_EQ(plan.ratios[0].end[row.position], row.entries4);
    EXPECT_EQ(plan.ratios[1].end[row.position], row.entries128);
  }
}

TEST(ExpandPlan, RingTableBatchAndPadding) {
  Plan plan;
  plan.query_start = {0, 1, 4};
  plan.context_len = {300, 63};
  // Sequence 0: token 300 is in logical block 4 = column 0 of 4. Sequence 1: blocks 0, 1, 2 where
  // block 1 is missing.
  plan.window_table = {9, 3, 4, 8, 20, -1, 22, -1};
  plan.growing_table = {6, 2, 1, -1};
  plan.expand(6, {4});
  EXPECT_EQ(plan.window_slots,
            (std::vector<int64_t>{9 * 64 + 300 % 64, 20 * 64 + 63, -1, -1, -1, -1}));
  EXPECT_EQ(plan.positions, (std::vector<int32_t>{300, 63, 64, 65, 0, 0}));
  EXPECT_EQ(plan.token_to_seq, (std::vector<int32_t>{0, 1, 1, 1, 0, 0}));
  EXPECT_EQ(plan.window_begin, (std::vector<int32_t>{173, 0, 0, 0, 0, 0}));
  EXPECT_EQ(plan.window_end, (std::vector<int32_t>{301, 64, 65, 66, 0, 0}));
  EXPECT_EQ(plan.ratios[0].slots, (std::vector<int64_t>{-1, 64 + 15, -1, -1, -1, -1}));
  EXPECT_EQ(plan.ratios[0].end, (std::vector<int32_t>{75, 16, 16, 16, 0, 0}));
}

// Slots pass 2^31 in large caches.
TEST(ExpandPlan, LargeBlockNumbers) {
  Plan plan;
  plan.query_start = {0, 1};
  plan.context_len = {255};
  plan.window_table = {0, 0, 0, 0x7fffffff};
  plan.growing_table = {0x7ffffffe, 0};
  plan.expand(1, {4});
  EXPECT_EQ(plan.window_slots[0], int64_t{0x7fffffff} * 64 + 63);
  EXPECT_EQ(plan.ratios[0].slots[0], int64_t{0x7ffffffe} * 64 + 63);
}

}  // namespace
}  // namespace dsv4::cpu::testing
