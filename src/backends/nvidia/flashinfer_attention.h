// FLASHINFER_MLA_SPARSE_DSV4: the attention layer on NVIDIA GPUs over plain bf16 or per-tensor FP8
// rows.
#pragma once
#include <memory>

#include "backends/nvidia/descriptors.h"
#include "dsv4/attention.h"

namespace dsv4::nvidia {

class FlashInferAttention final : public DeepseekV4Attention {
 public:
  explicit FlashInferAttention(const AttentionArgs& args) : DeepseekV4Attention(args) {}
  static std::unique_ptr<DeepseekV4Attention> create(const AttentionArgs& args);
  const AttentionDescriptor& descriptor() const override { return flashinfer_descriptor(); }

 protected:
  int padded_num_q_heads(int num_heads) const override {
    return descriptor().padded_num_q_heads(num_heads);
  }
  void forward_mqa(Step& step) const override;
  void o_proj(Step& step, Tensor out) const override;
};

}  // namespace dsv4::nvidia
