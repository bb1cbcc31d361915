// The CPU's kernels: which families exist, which candidates each has (best first, reference last),
// which one runs. DSV4_KERNEL=family:name[,family:name] forces a candidate; tests force every one
// in turn.
#pragma once
#include <span>
#include <string>
#include <string_view>

#include "ops/ops.h"

namespace dsv4::cpu {

struct Candidate {
  std::string_view family;  ///< "linear", "attend", "index_logits", "rowwise", ...
  std::string_view name;    ///< "avx512bf16", "avx2", "reference"
  /// Empty when it runs on this machine; else the reason why not, e.g. "needs avx512_bf16".
  std::string (*why_not)();
  void (*install)(Ops&);  ///< sets the operations of its family
};

/// All candidates, grouped by family, best first.
std::span<const Candidate> candidates();

/// The table with the best usable candidate of every family, or the forced ones.
/// @throws Error kInvalidArgument: unknown family or name (lists them); kUnsupported: the forced
/// one cannot run here.
Ops make_ops(std::string_view forced);

// One list per family, defined beside its kernels (ops/<family>.cc).
std::span<const Candidate> linear_candidates();
std::span<const Candidate> attend_candidates();
std::span<const Candidate> index_logits_candidates();
std::span<const Candidate> rowwise_candidates();

// Operations with one portable implementation.
void gather_rows(const GatherRowsParams& params, const OpContext& context);
void expand_plan(const ExpandPlanParams& params, const OpContext& context);
void top_k(const TopKParams& params, const OpContext& context);
void map_slots(const MapSlotsParams& params, const OpContext& context);
void ragged_rows(const RaggedRowsParams& params, const OpContext& context);
void moe(const MoeParams& params, const OpContext& context);

// Scratch bounds, one per file that takes scratch.
int64_t linear_scratch_bytes(const ScratchLimits& limits);
int64_t attend_scratch_bytes(const ScratchLimits& limits);
int64_t index_logits_scratch_bytes(const ScratchLimits& limits);
int64_t top_k_scratch_bytes(const ScratchLimits& limits);
int64_t rowwise_scratch_bytes(const ScratchLimits& limits);
int64_t moe_scratch_bytes(const ScratchLimits& limits);

}  // namespace dsv4::cpu
