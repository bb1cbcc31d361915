#include "backends/cpu/cpu_attention.h"

#include "attention/stages.h"

namespace dsv4::cpu {

std::unique_ptr<DeepseekV4Attention> CpuAttention::create(const AttentionArgs& args) {
  return std::make_unique<CpuAttention>(args);
}

void CpuAttention::forward_mqa(Step& step) const {
  attend_pages(step, layer(), ops());
}

void CpuAttention::o_proj(Step& step, Tensor out) const {
  project_out(step, layer(), ops(), out);
}

}  // namespace dsv4::cpu
