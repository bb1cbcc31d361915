#include "attention/stages.h"

#include <algorithm>
#include <vector>

namespace dsv4 {
namespace {

// The first heads of a padded [T, padded, head_dim] tensor.
Tensor real_heads(Tensor tensor, int num_heads) {
  tensor.shape[1] = num_heads;
  return tensor;
}

// A layer whose wo_a was left unquantised takes bf16 input, as vLLM does (o_proj.md 2).
bool quantises(const DeepseekV4Attention::Layer& layer, const Weight& wo_a) {
  return layer.numerics.wo_a == WoA::kFp8 && wo_a.dtype == DType::kF8E4M3;
}
// Is it codes that wo_a reads? They and their scales take less room than the values. Taps want to
// see values; products are the same.
bool rotates_to_codes(const DeepseekV4Attention::Step& step,
                      const DeepseekV4Attention::Layer& layer, const Weight& wo_a) {
  return quantises(layer, wo_a) && takes_codes(layer.numerics, wo_a) &&
         layer.config.head_dim % 128 == 0 && step.options->taps == nullptr;
}
RotatedInput rotation(const DeepseekV4Attention::Step& step,
                      const DeepseekV4Attention::Layer& layer) {
  return {layer.rope(), step.plan->positions, layer.config.head_dim};
}

}  // namespace

AttendParams attend_params(const DeepseekV4Attention::Step& step,
                           const DeepseekV4Attention::Layer& layer) {
  const PlanView& plan = *step.plan;
  AttendParams params{
      .q = step.q,
      .window =
          RangeRows{step.caches->window, plan.window_blocks, plan.window_begin, plan.window_end},
      .compressed = std::monostate{},
      .max_entries = layer.max_entries,
      .token_to_seq = plan.token_to_seq,
      .sink = reinterpret_cast<const float*>(layer.sink.data()),
      .softmax_scale = layer.config.softmax_scale(),
      .grid = layer.grid,
      .round_p_to_bf16 = layer.numerics.round_p_to_bf16,
      .out = step.o,
      .lse = nullptr,
      .rotation = rotation(step, layer),
      .raw_queries = step.attend_norms,
      .query_eps = layer.config.rms_norm_eps,
  };
  if (step.ratio != nullptr) {
    const CacheView& cache = step.caches->compressed;
    if (layer.kind.indexer && !step.all_entries_visible) {
      params.compressed = ListedRows{cache, step.topk_slots.as<int32_t>(),
                                     step.topk_slots.strides[0], step.topk_length};
      params.max_entries = step.topk_slots.shape[1];
    } else {
      BlockTable blocks = plan.growing_blocks;
      blocks.tokens_per_block = cache.rows_per_block;  // the list counts entries, not tokens
      params.compressed = RangeRows{cache, blocks, step.ratio->begin, step.ratio->end};
      if (step.all_entries_visible) {
        params.max_entries = std::min<int64_t>(layer.max_entries, layer.config.index_topk);
      }
    }
  }
  return params;
}

bool attend_norms_queries(const DeepseekV4Attention::Step& step,
                          const DeepseekV4Attention::Layer& layer, const Ops& ops) {
  if (step.branches == nullptr || ops.attend_takes_raw_queries == nullptr) return false;
  AttendParams params = attend_params(step, layer);
  params.raw_queries = true;
  return ops.attend_takes_raw_queries(params);
}

void attend_pages(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                  const Ops& ops) {
  AttendParams params = attend_params(step, layer);
  if (ops.attend_makes_codes != nullptr && rotates_to_codes(step, layer, layer.weights.wo_a)) {
    AttendParams codes = params;
    const InputRows out = codes_in_place(step.o_rotated);
    codes.out = out.rows;
    codes.scale = out.scale;
    step.attend_rotates = ops.attend_makes_codes(codes);
    if (step.attend_rotates) params = codes;
  }
  ops.attend(params, step.context(ops));
}

void project_out(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                 const Ops& ops, const Weight& wo_a, Tensor out) {
  const OpContext context = step.context(ops);
  const int64_t group_width = layer.config.group_width(), rank = layer.config.o_lora_rank;
  const bool quantise = quantises(layer, wo_a);
  InputRows x{step.o_rotated, {}}, z{step.z, {}};
  if (rotates_to_codes(step, layer, wo_a)) {
    x = codes_in_place(step.o_rotated);
    if (takes_codes(layer.numerics, layer.weights.wo_b) && rank % 128 == 0) {
      z = codes_in_place(step.z);
    }
  }
  // Or wo_a rotates the heads itself; what it reads then:
  LinearProblem late{.x = ConstTensor(step.o.data, step.o.dtype, {step.num_tokens(), group_width}),
                     .w = wo_a,
                     .out = {},
                     .input = rotation(step, layer)};
  late.x.strides[0] = step.o.strides[0];
  if (step.attend_rotates) {
    late.input = {};
  } else if (quantise && makes_input(ops, layer.numerics, step.branches, late)) {
    x = {step.o, {}};
  } else {
    late.input = {};
    ops.inverse_rope({.o = real_heads(step.o, layer.num_heads),
                      .rope = layer.rope(),
                      .positions = step.plan->positions,
                      .quantise = quantise,
                      .out = x.rows,
                      .scale = x.scale},
                     context);
  }

  constexpr int kMaxGroups = 64;
  DSV4_CHECK(layer.num_groups <= kMaxGroups);
  std::array<LinearProblem, kMaxGroups> groups;
  // Columns of a group, and their scales.
  const auto part = [&](const InputRows& whole, int64_t row_elems, int64_t begin, int64_t count) {
    InputRows out = whole;
    out.rows = Tensor(whole.rows.as<char>() + begin * size_of(whole.rows.dtype), whole.rows.dtype,
                      {step.num_tokens(), count});
    out.rows.strides[0] = row_elems;
    if (whole.scale.data != nullptr) out.scale.data += begin / 128 * whole.scale.stride;
    return out;
  };
  for (int g = 0; g < layer.num_groups; ++g) {
    const InputRows in = part(x, x.rows.strides[0], g * group_width, group_width);
    const InputRows out = part(z, step.z.strides[0], g * rank, rank);
    groups[static_cast<size_t>(g)] = {.x = in.rows,
                                      .w = wo_a.row_slice(g * rank, rank),
                                      .out = out.rows,
                                      .x_scale = in.scale,
                                      .out_scale = out.scale,
                                      .input = late.input};
  }
  ops.linear({.problems = {groups.data(), static_cast<size_t>(layer.num_groups)},
              .quantised_input = quantise,
              .products = layer.numerics.products},
             context);
  const LinearProblem last{z.rows, layer.weights.wo_b, out, z.scale};
  project(ops, context, layer.numerics, {&last, 1});
}

}  // namespace dsv4
