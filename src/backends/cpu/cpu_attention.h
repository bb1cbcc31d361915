// CPU_DSV4: the attention layer on CPUs, all formats and all numerics; the twin that other backends
// are compared with.
#pragma once
#include <memory>

#include "dsv4/attention.h"
#include "dsv4/backend.h"

namespace dsv4::cpu {

class CpuAttention final : public DeepseekV4Attention {
 public:
  explicit CpuAttention(const AttentionArgs& args) : DeepseekV4Attention(args) {}
  static const AttentionDescriptor& static_descriptor();
  static std::unique_ptr<DeepseekV4Attention> create(const AttentionArgs& args);
  const AttentionDescriptor& descriptor() const override { return static_descriptor(); }

 protected:
  int padded_num_q_heads(int num_heads) const override { return num_heads; }
  void forward_mqa(Step& step) const override;
  void o_proj(Step& step, Tensor out) const override;
};

}  // namespace dsv4::cpu
