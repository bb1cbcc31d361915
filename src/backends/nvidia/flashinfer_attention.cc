#include "backends/nvidia/flashinfer_attention.h"

#include "attention/stages.h"

namespace dsv4::nvidia {

std::unique_ptr<DeepseekV4Attention> FlashInferAttention::create(const AttentionArgs& args) {
  return std::make_unique<FlashInferAttention>(args);
}

void FlashInferAttention::forward_mqa(Step& step) const {
  attend_pages(step, layer(), ops());
}

void FlashInferAttention::o_proj(Step& step, Tensor out) const {
  project_out(step, layer(), ops(), layer().weights.wo_a, out);
}

}  // namespace dsv4::nvidia
