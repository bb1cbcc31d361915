// The plan of a step: per-sequence numbers are gathered and uploaded in one copy, per-token arrays
// are expanded from them on the device. Addresses are fixed at construction. Source:
// spec/dispatch.md 5.
#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

#include "core/arena.h"
#include "core/checked_math.h"
#include "dsv4/attention.h"
#include "ops/ops.h"

namespace dsv4 {
namespace {

// Element offsets of the uploaded per-sequence arrays: one staging buffer on the host, one image on
// the device.
struct Layout {
  int64_t window_columns;
  int64_t growing_columns;
  int64_t query_start, context_len, state_slot, window_table, growing_table;
  int64_t count;  // int32 elements in all

  Layout(const ModelConfig& config, const StepLimits& limits, const PoolLimits& pool) {
    // Live window rows: those that the first new token sees, and the new ones; one block more as
    // neither end is aligned.
    window_columns =
        ceil_div(config.sliding_window - 1 + std::max(limits.max_tokens, pool.max_step_tokens),
                 pool.window_block_tokens) +
        1;
    growing_columns = ceil_div(limits.max_context, pool.growing_block_tokens);
    count = 0;
    const auto take = [&](int64_t elems) {
      const int64_t begin = count;
      count += round_up(elems, 64);  // arrays start on their own cache lines
      return begin;
    };
    query_start = take(limits.max_seqs + 1);
    context_len = take(limits.max_seqs);
    state_slot = take(limits.max_seqs);
    window_table = take(limits.max_seqs * window_columns);
    growing_table = take(limits.max_seqs * growing_columns);
  }
};

struct TokenArrays {
  int32_t *positions, *token_to_seq, *window_begin, *window_end;
  int64_t* window_slot_mapping;
  std::vector<RatioPlan> ratios;

  TokenArrays(const ModelConfig& config, const StepLimits& limits, Arena& arena) {
    const int64_t tokens = limits.max_tokens;
    positions = arena.take_array<int32_t>(tokens);
    token_to_seq = arena.take_array<int32_t>(tokens);
    window_begin = arena.take_array<int32_t>(tokens);
    window_end = arena.take_array<int32_t>(tokens);
    window_slot_mapping = arena.take_array<int64_t>(tokens);
    for (int ratio : config.distinct_ratios()) {
      ratios.push_back({.ratio = ratio,
                        .slot_mapping = arena.take_array<int64_t>(tokens),
                        .begin = arena.take_array<int32_t>(tokens),
                        .end = arena.take_array<int32_t>(tokens)});
    }
  }
};

}  // namespace

struct StepPlan::Impl {
  ModelConfig config;
  StepLimits limits;
  PoolLimits pool_limits;
  Device& device;
  Layout layout;
  std::vector<int32_t> staging;
  Buffer sequence_memory;
  Buffer token_memory;
  std::vector<RatioPlan> ratios;
  PlanView view;

  Impl(const ModelConfig& config_, const StepLimits& limits_, const PoolLimits& pool_limits_,
       Device& device_)
      : config(config_),
        limits(limits_),
        pool_limits(pool_limits_),
        device(device_),
        layout(config_, limits_, pool_limits_),
        staging(static_cast<size_t>(layout.count)),
        sequence_memory(device_.allocate(layout.count * int64_t{sizeof(int32_t)})),
        token_memory(device_.allocate(token_bytes(config_, limits_))) {
    Arena arena(token_memory.data(), token_memory.bytes());
    TokenArrays arrays(config, limits, arena);
    ratios = std::move(arrays.ratios);
    const auto* base = reinterpret_cast<const int32_t*>(sequence_memory.data());
    view.query_start = base + layout.query_start;
    view.context_len = base + layout.context_len;
    view.state_slot = base + layout.state_slot;
    view.window_blocks = {base + layout.window_table, layout.window_columns,
                          static_cast<int32_t>(layout.window_columns),
                          pool_limits.window_block_tokens};
    view.growing_blocks = {base + layout.growing_table, layout.growing_columns,
                           static_cast<int32_t>(layout.growing_columns),
                           pool_limits.growing_block_tokens};
    view.positions = arrays.positions;
    view.token_to_seq = arrays.token_to_seq;
    view.window_begin = arrays.window_begin;
    view.window_end = arrays.window_end;
    view.window_slot_mapping = arrays.window_slot_mapping;
    view.ratios = ratios;
  }

  static int64_t token_bytes(const ModelConfig& config, const StepLimits& limits) {
    Arena measure;
    TokenArrays arrays(config, limits, measure);
    return measure.peak();
  }

  void check(std::span<const BatchEntry> batch, const KvCachePool& pool, int padded_tokens) const {
    if (static_cast<int64_t>(batch.size()) > limits.max_seqs) {
      fail(ErrorCode::kInvalidArgument, "step of ", batch.size(), " sequences, the limit is ",
           limits.max_seqs);
    }
    int64_t tokens = 0;
    std::set<SequenceId> seen;
    for (const BatchEntry& entry : batch) {
      if (entry.num_tokens < 1) {
        fail(ErrorCode::kInvalidArgument, "sequence ", entry.sequence, ": ", entry.num_tokens,
             " new tokens, expected at least 1");
      }
      if (!seen.insert(entry.sequence).second) {
        fail(ErrorCode::kInvalidArgument, "sequence ", entry.sequence, " occurs twice in one step");
      }
      tokens += entry.num_tokens;
      const int64_t context = pool.length(entry.sequence) + entry.num_tokens;
      if (context > limits.max_context) {
        fail(ErrorCode::kInvalidArgument, "sequence ", entry.sequence, " would hold ", context,
             " tokens, the limit is ", limits.max_context);
      }
      const auto growing = static_cast<int64_t>(pool.growing_blocks(entry.sequence).size());
      const auto window = pool.window_blocks(entry.sequence);
      if (!config.distinct_ratios().empty() &&
          growing * pool_limits.growing_block_tokens < context) {
        fail(ErrorCode::kInvalidArgument, "sequence ", entry.sequence, ": room for ",
             growing * pool_limits.growing_block_tokens, " tokens is reserved, ", context,
             " are needed");
      }
      if (window.first_token +
                  static_cast<int64_t>(window.blocks.size()) * pool_limits.window_block_tokens <
              context ||
          static_cast<int64_t>(window.blocks.size()) > layout.window_columns) {
        fail(ErrorCode::kInvalidArgument, "sequence ", entry.sequence, ": ", window.blocks.size(),
             " window blocks from token ", window.first_token, " do not cover ", context,
             " tokens within ", layout.window_columns, " columns: reserve the step's tokens first");
      }
    }
    if (std::max<int64_t>(tokens, padded_tokens) > limits.max_tokens) {
      fail(ErrorCode::kInvalidArgument, "step of ", std::max<int64_t>(tokens, padded_tokens),
           " tokens, the limit is ", limits.max_tokens);
    }
  }

  void update(std::span<const BatchEntry> batch, const KvCachePool& pool, Stream stream,
              int padded_tokens, bool for_recording) {
    check(batch, pool, padded_tokens);
    int32_t tokens = 0, max_query = 0;
    int64_t max_context = 0;
    for (size_t s = 0; s < batch.size(); ++s) {
      const auto& [sequence, num_tokens] = batch[s];
      const int64_t context = pool.length(sequence);
      staging[layout.query_start + s] = tokens;
      staging[layout.context_len + s] = static_cast<int32_t>(context);
      staging[layout.state_slot + s] = pool.state_slot(sequence);
      int32_t* window_row = &staging[layout.window_table + s * layout.window_columns];
      std::fill_n(window_row, layout.window_columns, -1);
      const auto window = pool.window_blocks(sequence);
      const int64_t first_block = window.first_token / pool_limits.window_block_tokens;
      for (size_t i = 0; i < window.blocks.size(); ++i) {
        window_row[(first_block + static_cast<int64_t>(i)) % layout.window_columns] =
            window.blocks[i];
      }
      const auto growing = pool.growing_blocks(sequence);
      int32_t* growing_row = &staging[layout.growing_table + s * layout.growing_columns];
      const int64_t used =
          std::min<int64_t>(static_cast<int64_t>(growing.size()), layout.growing_columns);
      std::copy_n(growing.data(), used, growing_row);
      std::fill(growing_row + used, growing_row + layout.growing_columns, -1);
      tokens += num_tokens;
      max_query = std::max(max_query, num_tokens);
      max_context = std::max(max_context, context + num_tokens);
    }
    // Sequences after the last one have no tokens.
    for (auto s = static_cast<int64_t>(batch.size()); s <= limits.max_seqs; ++s)
      staging[layout.query_start + s] = tokens;
    view.num_tokens = std::max(tokens, padded_tokens);
    view.num_seqs = for_recording ? limits.max_seqs : static_cast<int32_t>(batch.size());
    view.max_query_len = for_recording && max_query > 1 ? view.num_tokens : max_query;
    view.max_context = for_recording ? limits.max_context : max_context;
    // Only the rows in use travel: growing tables of a million tokens are 16 KiB a sequence.
    const int64_t bytes =
        (layout.growing_table + static_cast<int64_t>(batch.size()) * layout.growing_columns) *
        int64_t{sizeof(int32_t)};
    device.copy_to_device(sequence_memory.data(), staging.data(), bytes, stream);
    Arena no_scratch(sequence_memory.data(), 0);  // the operation takes none
    const OpContext context{stream, &no_scratch, &device.ops()};
    device.ops().expand_plan({.plan = view, .sliding_window = config.sliding_window}, context);
  }
};

StepPlan::StepPlan(const ModelConfig& config, const StepLimits& limits,
                   const PoolLimits& pool_limits, Device& device) {
  if (limits.max_tokens < 1 || limits.max_seqs < 1 || limits.max_context < 1 ||
      limits.max_context > INT32_MAX) {
    fail(ErrorCode::kInvalidArgument, "step limits of ", limits.max_tokens, " tokens, ",
         limits.max_seqs, " sequences, ", limits.max_context,
         " context: each must be at least 1, the context at most ", INT32_MAX);
  }
  impl_ = std::make_unique<Impl>(config, limits, pool_limits, device);
}

StepPlan::~StepPlan() = default;

void StepPlan::update(std::span<const BatchEntry> batch, const KvCachePool& pool, Stream stream,
                      int padded_tokens, bool for_recording) {
  impl_->update(batch, pool, stream, padded_tokens, for_recording);
}

const PlanView& StepPlan::view() const {
  return impl_->view;
}
const StepLimits& StepPlan::limits() const {
  return impl_->limits;
}
int64_t StepPlan::device_bytes() const {
  return impl_->sequence_memory.bytes() + impl_->token_memory.bytes();
}

int64_t StepPlan::device_bytes(const ModelConfig& config, const StepLimits& limits,
                               const PoolLimits& pool_limits) {
  return Layout(config, limits, pool_limits).count * int64_t{sizeof(int32_t)} +
         Impl::token_bytes(config, limits);
}

}  // namespace dsv4
