#include "backends/cpu/cpu_attention.h"

#include "attention/stages.h"

namespace dsv4::cpu {

const AttentionDescriptor& CpuAttention::static_descriptor() {
  static const AttentionDescriptor descriptor = [] {
    AttentionDescriptor out;
    out.name = "CPU_DSV4";
    out.class_name = "CpuAttention";
    out.platform = Platform::kCpu;
    out.native_format = KvFormat::kFp8DsMla;
    out.kv_formats = {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32};
    out.packed_layout = true;
    out.index_formats = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32};
    out.activations = {DType::kBf16, DType::kF32};
    out.wo_a_forms = {WoA::kFp8, WoA::kBf16, WoA::kF32};
    out.padded_num_q_heads = [](int num_heads) { return num_heads; };
    out.head_sizes = {512};
    out.compress_ratios = {0, 4, 128};
    out.supports_uniform_graph = false;
    out.architectures = {"cpu"};
    return out;
  }();
  return descriptor;
}

std::unique_ptr<DeepseekV4Attention> CpuAttention::create(const AttentionArgs& args) {
  return std::make_unique<CpuAttention>(args);
}

void CpuAttention::forward_mqa(Step& step) const {
  attend_pages(step, layer(), ops());
}

void CpuAttention::o_proj(Step& step, Tensor out) const {
  project_out(step, layer(), ops(), layer().weights.wo_a, out);
}

}  // namespace dsv4::cpu
