// Exact top-k on NVIDIA: what the candidates share on the host side. Kernel: top_k-inl.h.
#pragma once
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
};

inline TopKArgs top_k_args(const TopKParams& params) {
  return {.logits = params.logits.as<float>(),
          .logits_stride = params.logits.strides[0],
          .width = static_cast<int32_t>(params.logits.shape[1]),
          .end = params.end,
          .indices = params.topk_indices.as<int32_t>(),
          .indices_stride = params.topk_indices.strides[0],
          .k = static_cast<int32_t>(params.topk_indices.shape[1]),
          .length = params.topk_length};
}

/// A row is shared by a cluster of CTAs.
void top_k_sm90(const TopKParams& params, const OpContext& context);
/// One CTA for every row.
void top_k_sm80(const TopKParams& params, const OpContext& context);
/// Bisection of the keys; simple.
void top_k_reference(const TopKParams& params, const OpContext& context);

}  // namespace dsv4::nvidia
