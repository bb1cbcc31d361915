// Exact top-k on NVIDIA: what the candidates share on the host side. Kernels: top_k-inl.h,
// top_k_short-inl.h.
#pragma once
#include <bit>
#include <cstdint>

#include "ops/ops.h"

namespace dsv4::nvidia {

struct TopKArgs {
  const float* logits;
  int64_t logits_stride;
  int32_t width;       ///< of a row; end is clamped to it
  const int32_t* end;  ///< [tokens]
  int32_t* indices;
  int64_t indices_stride;
  int32_t k;
  int32_t* length;  ///< [tokens]
  // Slots of the indices (MapSlotsParams), where `slots` is not null.
  int32_t* slots = nullptr;
  int64_t slots_stride = 0;
  const int32_t* token_to_seq = nullptr;
  const int32_t* blocks = nullptr;
  int64_t blocks_stride = 0;
  int32_t block_columns = 0;
  int32_t rows_per_block = 0;
  int32_t block_shift = -1;  ///< log2 of rows_per_block, or -1
};

inline TopKArgs top_k_args(const TopKParams& params) {
  TopKArgs args{.logits = params.logits.as<float>(),
                .logits_stride = params.logits.strides[0],
                .width = static_cast<int32_t>(params.logits.shape[1]),
                .end = params.end,
                .indices = params.topk_indices.as<int32_t>(),
                .indices_stride = params.topk_indices.strides[0],
                .k = static_cast<int32_t>(params.topk_indices.shape[1]),
                .length = params.topk_length};
  const TopKSlots& slots = params.slots;
  if (slots.slots.data == nullptr) return args;
  args.slots = slots.slots.as<int32_t>();
  args.slots_stride = slots.slots.strides[0];
  args.token_to_seq = slots.token_to_seq;
  args.blocks = slots.blocks.table;
  args.blocks_stride = slots.blocks.stride;
  args.block_columns = slots.blocks.columns;
  args.rows_per_block = slots.rows_per_block;
  const auto rows = static_cast<uint32_t>(slots.rows_per_block);
  args.block_shift = std::has_single_bit(rows) ? std::countr_zero(rows) : -1;
  return args;
}

/// A row is shared by a cluster of CTAs.
void top_k_sm90(const TopKParams& params, const OpContext& context);
/// One CTA for every row.
void top_k_sm80(const TopKParams& params, const OpContext& context);
/// Bisection of the keys; simple. Without slots.
void top_k_reference(const TopKParams& params, const OpContext& context);

/// Rows of at most TopKTraits::kShortRow scores: one CTA each.
void top_k_short(const TopKParams& params, const OpContext& context);

}  // namespace dsv4::nvidia
