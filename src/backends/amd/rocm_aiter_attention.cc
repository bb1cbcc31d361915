#include "backends/amd/rocm_aiter_attention.h"

#include <limits>
#include <vector>

#include "attention/stages.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"

namespace dsv4::amd {
namespace {

// bf16(fp32(w8) * scale) of every element (o_proj.md 2).
std::vector<Bf16> expand_to_bf16(const Weight& weight, Device& device) {
  const Stream stream = device.default_stream();
  std::vector<uint8_t> codes(
      static_cast<size_t>((weight.rows - 1) * weight.row_stride + weight.cols));
  std::vector<uint8_t> scales(static_cast<size_t>(
      (ceil_div(weight.rows, int64_t{weight.block_rows}) - 1) * weight.scale_stride +
      ceil_div(weight.cols, int64_t{weight.block_cols})));
  device.copy_to_host(codes.data(), weight.data, std::ssize(codes), stream);
  device.copy_to_host(scales.data(), weight.scale, std::ssize(scales), stream);
  device.synchronize(stream);
  float value_of[256];
  for (int code = 0; code < 256; ++code) value_of[code] = e4m3_to_f32(static_cast<uint8_t>(code));
  std::vector<Bf16> out(static_cast<size_t>(weight.rows * weight.cols));
  for (int64_t r = 0; r < weight.rows; ++r) {
    const uint8_t* row = codes.data() + r * weight.row_stride;
    const uint8_t* row_scales = scales.data() + r / weight.block_rows * weight.scale_stride;
    for (int64_t c = 0; c < weight.cols; ++c) {
      out[static_cast<size_t>(r * weight.cols + c)] =
          Bf16(value_of[row[c]] * e8m0_to_f32(row_scales[c / weight.block_cols]));
    }
  }
  return out;
}

// The rows of every token as a flat list in scratch memory; no token has more than `max_rows`.
RaggedRows flatten(const std::variant<RangeRows, ListedRows>& rows, int64_t max_rows,
                   const PlanView& plan, const Ops& ops, const OpContext& context) {
  DSV4_CHECK(plan.num_tokens * max_rows <= std::numeric_limits<int32_t>::max());
  int32_t* indptr = context.scratch->take_array<int32_t>(plan.num_tokens + 1);
  int32_t* slots = context.scratch->take_array<int32_t>(plan.num_tokens * max_rows);
  ops.ragged_rows({.rows = rows,
                   .token_to_seq = plan.token_to_seq,
                   .num_tokens = plan.num_tokens,
                   .indptr = indptr,
                   .slots = slots},
                  context);
  const CacheView& cache =
      std::visit([](const auto& r) -> const CacheView& { return r.cache; }, rows);
  return {cache, slots, indptr};
}

}  // namespace

RocmAiterAttention::RocmAiterAttention(const AttentionArgs& args)
    : DeepseekV4Attention(args), wo_a_(layer().weights.wo_a) {
  if (numerics().wo_a != WoA::kBf16 || wo_a_.dtype != DType::kF8E4M3) return;
  const std::vector<Bf16> expanded = expand_to_bf16(wo_a_, device());
  const int64_t bytes = std::ssize(expanded) * int64_t{sizeof(Bf16)};
  wo_a_bf16_ = device().allocate(bytes);
  device().copy_to_device(wo_a_bf16_.data(), expanded.data(), bytes, device().default_stream());
  device().synchronize(device().default_stream());
  wo_a_ = {.dtype = DType::kBf16,
           .data = wo_a_bf16_.data(),
           .rows = wo_a_.rows,
           .cols = wo_a_.cols,
           .row_stride = wo_a_.cols};
}

std::unique_ptr<DeepseekV4Attention> RocmAiterAttention::create(const AttentionArgs& args) {
  return std::make_unique<RocmAiterAttention>(args);
}

void RocmAiterAttention::forward_mqa(Step& step) const {
  const OpContext context = step.context(ops());
  Arena::Scope scope(*step.scratch);
  AttendParams params = attend_params(step, layer());
  params.window = flatten(std::get<RangeRows>(params.window), layer().config.sliding_window,
                          *step.plan, ops(), context);
  if (const auto* range = std::get_if<RangeRows>(&params.compressed)) {
    params.compressed = flatten(*range, params.max_entries, *step.plan, ops(), context);
  } else if (const auto* list = std::get_if<ListedRows>(&params.compressed)) {
    params.compressed = flatten(*list, params.max_entries, *step.plan, ops(), context);
  }
  ops().attend(params, context);
}

void RocmAiterAttention::o_proj(Step& step, Tensor out) const {
  project_out(step, layer(), ops(), wo_a_, out);
}

}  // namespace dsv4::amd
