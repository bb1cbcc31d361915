#include "backends/amd/candidates.h"

#include <algorithm>

#include "attention/descriptor.h"
#include "backends/amd/ops/linear_ops.h"
#include "backends/amd/ops/moe_ops.h"
#include "backends/gpu/model_rows_ops.h"
#include "backends/gpu/rowwise_ops.h"
#include "ops/forced_candidates.h"

namespace dsv4::amd {
namespace {

constexpr Capability kGfx90a{9, 0, 10}, kGfx942{9, 4, 2}, kGfx950{9, 5, 0};

std::string needs(const char* names, const Capability& capability) {
  return concat("needs ", names, ", this is ", architecture_name(Platform::kRocm, capability));
}

// Flat lists of a layer's rows (RocmAiterAttention::forward_mqa), which live beside what `attend`
// takes.
int64_t flat_list_bytes(const ScratchLimits& limits) {
  const int64_t entries = limits.index_topk > 0
                              ? std::min<int64_t>(limits.index_topk, limits.max_entries)
                              : limits.max_entries;
  return limits.max_tokens * (limits.sliding_window + entries + 2) * int64_t{sizeof(int32_t)} +
         4 * Arena::kAlignment;
}

int64_t scratch_bytes(const ScratchLimits& limits) {
  return flat_list_bytes(limits) +
         std::max({gpu::rowwise_scratch_bytes(limits), gpu::model_rows_scratch_bytes(limits),
                   linear_scratch_bytes(limits), moe_scratch_bytes(limits)});
}

}  // namespace

std::string needs_cdna(const Capability& capability) {
  for (const Capability& known : {kEmulated, kGfx90a, kGfx942, kGfx950}) {
    if (capability == known) return "";
  }
  return needs("gfx90a, gfx942 or gfx950", capability);
}

std::string needs_gfx950(const Capability& capability) {
  return capability == kEmulated || capability == kGfx950 ? "" : needs("gfx950", capability);
}

Ops make_ops(std::span<const Candidate> candidates, const Capability& capability,
             std::string_view forced) {
  Ops ops;
  ops.scratch_bytes = scratch_bytes;
  install_candidates(ops, candidates, forced,
                     [&](const Candidate& candidate) { return candidate.why_not(capability); });
  return ops;
}

}  // namespace dsv4::amd
