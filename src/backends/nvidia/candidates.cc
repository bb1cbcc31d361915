#include "backends/nvidia/candidates.h"

#include <algorithm>
#include <vector>

#include "attention/descriptor.h"
#include "backends/nvidia/ops/families.h"
#include "ops/forced_candidates.h"

namespace dsv4::nvidia {

std::string needs_sm80(const Capability& capability) {
  if (capability.major >= 8) return "";
  return concat("needs sm_80 or later, this is ", architecture_name(Platform::kCuda, capability));
}

std::string needs_sm90(const Capability& capability) {
  if (capability.major == 9 && capability.minor == 0) return "";
  return concat("needs sm_90, this is ", architecture_name(Platform::kCuda, capability));
}

std::span<const Candidate> candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> list;
    for (const auto family :
         {rowwise_candidates(), linear_candidates(), attend_candidates(), index_logits_candidates(),
          top_k_candidates(), moe_candidates(), model_rows_candidates()}) {
      list.insert(list.end(), family.begin(), family.end());
    }
    return list;
  }();
  return all;
}

namespace {

int64_t scratch_bytes(const ScratchLimits& limits) {
  return std::max({linear_scratch_bytes(limits), attend_scratch_bytes(limits),
                   index_logits_scratch_bytes(limits), top_k_scratch_bytes(limits),
                   rowwise_scratch_bytes(limits), moe_scratch_bytes(limits),
                   model_rows_scratch_bytes(limits)});
}

}  // namespace

Ops make_ops(const Capability& capability, std::string_view forced) {
  Ops ops;
  ops.scratch_bytes = scratch_bytes;
  install_candidates(ops, candidates(), forced,
                     [&](const Candidate& candidate) { return candidate.why_not(capability); });
  return ops;
}

}  // namespace dsv4::nvidia
