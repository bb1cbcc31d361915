// Per-token arrays of a step from its per-sequence arrays (dispatch.md 5.2, 5.3, 5.6).
#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/rowwise.h"

namespace dsv4::cpu {
namespace {

// Slot of row `row` of a sequence where a block holds `rows_per_block` rows; -1 without a block.
int64_t slot_of(const BlockTable& blocks, int64_t sequence, int64_t row, int64_t rows_per_block) {
  const int64_t column = row / rows_per_block % blocks.columns;
  const int64_t block = blocks.table[sequence * blocks.stride + column];
  return block < 0 ? -1 : block * rows_per_block + row % rows_per_block;
}

// Tokens after the last sequence: nothing is written or seen, addresses stay legal.
void pad_token(const PlanView& plan, int64_t t) {
  plan.positions[t] = 0;
  plan.token_to_seq[t] = 0;
  plan.window_slot_mapping[t] = -1;
  plan.window_begin[t] = 0;
  plan.window_end[t] = 0;
  for (const RatioPlan& ratio : plan.ratios) {
    ratio.slot_mapping[t] = -1;
    ratio.begin[t] = 0;
    ratio.end[t] = 0;
  }
}

}  // namespace

void expand_plan(const ExpandPlanParams& params, const OpContext&) {
  const PlanView& plan = params.plan;
  const int64_t used = plan.num_seqs == 0 ? 0 : plan.query_start[plan.num_seqs];
  for (int32_t s = 0; s < plan.num_seqs; ++s) {
    for (int64_t t = plan.query_start[s]; t < plan.query_start[s + 1]; ++t) {
      const int32_t position = plan.context_len[s] + static_cast<int32_t>(t - plan.query_start[s]);
      plan.positions[t] = position;
      plan.token_to_seq[t] = s;
      plan.window_slot_mapping[t] =
          slot_of(plan.window_blocks, s, position, plan.window_blocks.tokens_per_block);
      plan.window_begin[t] = std::max(0, position - params.sliding_window + 1);
      plan.window_end[t] = position + 1;
      for (const RatioPlan& ratio : plan.ratios) {
        const int32_t entries = (position + 1) / ratio.ratio;
        const bool emits = (position + 1) % ratio.ratio == 0;
        ratio.slot_mapping[t] = emits ? slot_of(plan.growing_blocks, s, entries - 1,
                                                plan.growing_blocks.tokens_per_block / ratio.ratio)
                                      : -1;
        ratio.begin[t] = 0;
        ratio.end[t] = entries;
      }
    }
  }
  for (int64_t t = used; t < plan.num_tokens; ++t) pad_token(plan, t);
}

}  // namespace dsv4::cpu
