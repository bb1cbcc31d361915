#include "backends/amd/descriptors.h"

#include "backends/amd/driver.h"

namespace dsv4::amd {
namespace {

// Of code objects in this build, separated by commas; set by CMake.
constexpr std::string_view kArchitectures = DSV4_AMD_ARCHITECTURES;

}  // namespace

const AttentionDescriptor& rocm_aiter_descriptor() {
  static const AttentionDescriptor descriptor = [] {
    AttentionDescriptor out;
    out.name = "ROCM_FLASHMLA_SPARSE_DSV4";
    out.class_name = "RocmAiterAttention";
    out.platform = Platform::kRocm;
    out.native_format = KvFormat::kFp8DsMla;
    out.kv_formats = {KvFormat::kFp8DsMla};
    out.packed_layout = true;
    out.index_formats = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4};
    out.activations = {DType::kBf16};
    // gfx942 has FP8 arithmetic in the FNUZ form only, so the projection runs in bf16.
    out.wo_a_forms = {WoA::kBf16, WoA::kFp8};
    out.expands_wo_a = true;
    out.padded_num_q_heads = [](int num_heads) { return num_heads; };
    out.head_sizes = {512};
    out.compress_ratios = {0, 4, 128};
    out.growing_block_tokens = {256};
    for (std::string_view rest = kArchitectures; !rest.empty();) {
      const size_t comma = std::min(rest.find(','), rest.size());
      out.architectures.emplace_back(rest.substr(0, comma));
      rest.remove_prefix(std::min(comma + 1, rest.size()));
    }
    if (out.architectures.empty())
      out.not_built = "not built in (configure with -DDSV4_ENABLE_HIP=ON)";
    out.architectures.emplace_back("emulated");
    return out;
  }();
  return descriptor;
}

std::string why_not_here() {
  const std::string& not_built = rocm_aiter_descriptor().not_built;
  const std::string why_none = find_devices().why_none;
  return not_built + (not_built.empty() || why_none.empty() ? "" : "; ") + why_none;
}

}  // namespace dsv4::amd
