// ROCM_FLASHMLA_SPARSE_DSV4: the attention layer on AMD GPUs over packed fp8_ds_mla pages
// (spec/dispatch.md 1.2, 1.4, 7.4): heads are not padded, rows are attended to through flat lists,
// the output is projected in bf16, everything runs in sequence on one stream.
#pragma once
#include <memory>

#include "backends/amd/descriptors.h"
#include "dsv4/attention.h"
#include "ops/weight.h"

namespace dsv4::amd {

class RocmAiterAttention final : public DeepseekV4Attention {
 public:
  /// Where the numerics project in bf16, an FP8 wo_a is expanded to bf16 here, once; a power of two
  /// times E4M3 is exact in it.
  explicit RocmAiterAttention(const AttentionArgs& args);
  static std::unique_ptr<DeepseekV4Attention> create(const AttentionArgs& args);
  const AttentionDescriptor& descriptor() const override { return rocm_aiter_descriptor(); }

 protected:
  int padded_num_q_heads(int num_heads) const override { return num_heads; }
  /// Flattens window and compressed rows (flat slots and row pointers), then attends.
  void forward_mqa(Step& step) const override;
  void o_proj(Step& step, Tensor out) const override;

 private:
  Weight wo_a_;       // as stored, or in wo_a_bf16_
  Buffer wo_a_bf16_;  // [rows, cols] of this rank
};

}  // namespace dsv4::amd
