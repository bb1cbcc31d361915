#include "backends/cpu/candidates.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backends/cpu/parallel.h"
#include "core/fail.h"
#include "ops/forced_candidates.h"

namespace dsv4::cpu {
namespace {

void zero(const ZeroParams& params, const OpContext& context) {
  const Tensor& out = params.out;
  int64_t row_elems = 1;
  for (int i = 1; i < out.rank; ++i) row_elems *= out.shape[i];
  const int64_t row_bytes = row_elems * size_of(out.dtype);
  const int64_t stride_bytes = out.strides[0] * size_of(out.dtype);
  parallel_chunks(context.stream, out.shape[0], 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      std::memset(static_cast<char*>(out.data) + row * stride_bytes, 0,
                  static_cast<size_t>(row_bytes));
    }
  });
}

int64_t scratch_bytes(const ScratchLimits& limits) {
  return std::max({linear_scratch_bytes(limits), attend_scratch_bytes(limits),
                   index_logits_scratch_bytes(limits), top_k_scratch_bytes(limits),
                   rowwise_scratch_bytes(limits), moe_scratch_bytes(limits)});
}

}  // namespace

std::span<const Candidate> candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> list;
    for (const auto family : {linear_candidates(), attend_candidates(), index_logits_candidates(),
                              rowwise_candidates()}) {
      list.insert(list.end(), family.begin(), family.end());
    }
    return list;
  }();
  return all;
}

Ops make_ops(std::string_view forced) {
  Ops ops;
  ops.gather_rows = gather_rows;
  ops.zero = zero;
  ops.expand_plan = expand_plan;
  ops.top_k = top_k;
  ops.map_slots = map_slots;
  ops.ragged_rows = ragged_rows;
  ops.moe = moe;
  ops.scratch_bytes = scratch_bytes;
  install_candidates(ops, candidates(), forced,
                     [](const Candidate& candidate) { return candidate.why_not(); });
  return ops;
}

}  // namespace dsv4::cpu
