// One list of candidates per family, defined beside its kernels (ops/<family>.cu), and the scratch
// memory that a family needs.
#pragma once
#include <span>

#include "backends/nvidia/candidates.h"

namespace dsv4::nvidia {

std::span<const Candidate> rowwise_candidates();
std::span<const Candidate> linear_candidates();
std::span<const Candidate> attend_candidates();
std::span<const Candidate> index_logits_candidates();
std::span<const Candidate> top_k_candidates();
std::span<const Candidate> moe_candidates();
std::span<const Candidate> model_rows_candidates();

int64_t rowwise_scratch_bytes(const ScratchLimits& limits);
int64_t linear_scratch_bytes(const ScratchLimits& limits);
int64_t attend_scratch_bytes(const ScratchLimits& limits);
int64_t index_logits_scratch_bytes(const ScratchLimits& limits);
int64_t top_k_scratch_bytes(const ScratchLimits& limits);
int64_t moe_scratch_bytes(const ScratchLimits& limits);
int64_t model_rows_scratch_bytes(const ScratchLimits& limits);

}  // namespace dsv4::nvidia
