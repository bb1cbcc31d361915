#include "backends/nvidia/descriptors.h"

#include <algorithm>

#include "backends/nvidia/driver.h"

namespace dsv4::nvidia {
namespace {

// Set by CMake: "sm_80,compute_80,sm_90a,sm_120"; empty in a build without CUDA.
constexpr std::string_view kBuiltFor = DSV4_CUDA_ARCHITECTURES;

std::vector<std::string> split(std::string_view list) {
  std::vector<std::string> out;
  while (!list.empty()) {
    const size_t comma = std::min(list.find(','), list.size());
    out.emplace_back(list.substr(0, comma));
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  return out;
}

AttentionDescriptor common() {
  AttentionDescriptor out;
  out.platform = Platform::kCuda;
  out.index_formats = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4};
  out.activations = {DType::kBf16};
  out.wo_a_forms = {WoA::kFp8, WoA::kBf16};
  out.max_heads = 128;
  // Tensor core tiles are masked, not padded in memory: any count is taken as it is.
  out.padded_num_q_heads = [](int num_heads) { return num_heads; };
  out.head_sizes = {512};
  out.compress_ratios = {0, 4, 128};
  out.architectures = split(kBuiltFor);
  out.fp8_product_architectures = {"sm_90a"};
  if (out.architectures.empty()) {
    out.not_built = "not built in (configure with -DDSV4_ENABLE_CUDA=ON)";
  }
  return out;
}

}  // namespace

const AttentionDescriptor& flashmla_descriptor() {
  static const AttentionDescriptor descriptor = [] {
    AttentionDescriptor out = common();
    out.name = "FLASHMLA_SPARSE_DSV4";
    out.class_name = "FlashMlaAttention";
    out.native_format = KvFormat::kFp8DsMla;
    out.kv_formats = {KvFormat::kFp8DsMla};
    out.packed_layout = true;
    return out;
  }();
  return descriptor;
}

const AttentionDescriptor& flashinfer_descriptor() {
  static const AttentionDescriptor descriptor = [] {
    AttentionDescriptor out = common();
    out.name = "FLASHINFER_MLA_SPARSE_DSV4";
    out.class_name = "FlashInferAttention";
    out.native_format = KvFormat::kBf16;
    out.kv_formats = {KvFormat::kBf16, KvFormat::kFp8};
    out.packed_layout = false;
    return out;
  }();
  return descriptor;
}

std::string why_not_here() {
  const std::string& not_built = flashmla_descriptor().not_built;
  const std::string why_none = find_devices().why_none;
  return not_built + (not_built.empty() || why_none.empty() ? "" : "; ") + why_none;
}

}  // namespace dsv4::nvidia
