// Choice of experts (model.md 4.1).
#include <limits>

#include "backends/cpu/ops/rowwise.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

// The k largest of p + bias, ties to the smaller id, NaN as -inf; written in ascending id.
// One pass with an insertion: few experts beat the k-th best so far.
void select_by_bias(const float* p, const float* bias, int64_t experts, int64_t k, int32_t* ids,
                    float* scores) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    float score = bias == nullptr ? p[e] : p[e] + bias[e];
    if (!(score == score)) score = -std::numeric_limits<float>::infinity();
    if (count == k && !(score > scores[k - 1])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && score > scores[at - 1]; --at) {
      scores[at] = scores[at - 1];
      ids[at] = ids[at - 1];
    }
    scores[at] = score;
    ids[at] = static_cast<int32_t>(e);
  }
  std::sort(ids, ids + k);
}

void select_by_table(const ConstTensor& table, int32_t token, int64_t experts, int64_t k,
                     int32_t* ids) {
  const auto* row = static_cast<const int64_t*>(row_at(table, token));
  for (int64_t i = 0; i < k; ++i) {
    if (row[i] < 0 || row[i] >= experts) {
      fail(ErrorCode::kDataCorrupt, "tid2eid[", token, "][", i, "] is ", row[i],
           ", expected an expert id below ", experts);
    }
    ids[i] = static_cast<int32_t>(row[i]);
  }
  std::sort(ids, ids + k);
}

}  // namespace

void route(const RowKernels& kernels, const RouteParams& params, const OpContext& context) {
  const int64_t experts = params.logits.shape[1], k = params.expert_ids.shape[1];
  constexpr int64_t kMaxTopK = 64;
  DSV4_CHECK(k <= kMaxTopK && k <= experts);
  Arena::Scope scope(*context.scratch);
  const ThreadRows buffers(context, experts);
  const auto* bias = params.bias ? params.bias.as<float>() : nullptr;
  parallel_chunks(
      context.stream, params.logits.shape[0], 16, [&](int64_t begin, int64_t end, int thread_idx) {
        float* p = buffers.of(thread_idx);
        float scores[kMaxTopK];
        for (int64_t t = begin; t < end; ++t) {
          auto* ids = static_cast<int32_t*>(row_at(params.expert_ids, t));
          auto* weights = static_cast<float*>(row_at(params.expert_weights, t));
          kernels.sqrt_softplus(static_cast<const float*>(row_at(params.logits, t)), experts, p);
          if (params.tid2eid) {
            select_by_table(params.tid2eid, params.token_ids[t], experts, k, ids);
          } else {
            select_by_bias(p, bias, experts, k, ids, scores);
          }
          float sum = 0;
          for (int64_t i = 0; i < k; ++i) sum += p[ids[i]];
          for (int64_t i = 0; i < k; ++i) weights[i] = p[ids[i]] / sum * params.scaling;
        }
      });
}

}  // namespace dsv4::cpu
