#include "backends/amd/descriptors.h"

#include "backends/amd/driver.h"

namespace dsv4::amd {
namespace {

// Set by CMake from DSV4_ENABLE_HIP.
constexpr bool kHostBuilt = DSV4_HAS_HIP_HOST != 0;

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
    out.wo_a_forms = {WoA::kBf16};
    out.padded_num_q_heads = [](int num_heads) { return num_heads; };
    out.head_sizes = {512};
    out.compress_ratios = {0, 4, 128};
    out.growing_block_tokens = {256};
    out.not_built = kHostBuilt ? "host side built; kernels are not part of this version"
                               : "not built in (configure with -DDSV4_ENABLE_HIP=ON)";
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
