#include "backends/nvidia/flashmla_attention.h"

#include "attention/stages.h"

namespace dsv4::nvidia {

std::unique_ptr<DeepseekV4Attention> FlashMlaAttention::create(const AttentionArgs& args) {
  return std::make_unique<FlashMlaAttention>(args);
}

void FlashMlaAttention::prepare(Step& step) const {
  step.attend_norms = attend_norms_queries(step, layer(), ops());
  DeepseekV4Attention::prepare(step);
}

void FlashMlaAttention::forward_mqa(Step& step) const {
  attend_pages(step, layer(), ops());
}

void FlashMlaAttention::o_proj(Step& step, Tensor out) const {
  project_out(step, layer(), ops(), layer().weights.wo_a, out);
}

}  // namespace dsv4::nvidia
