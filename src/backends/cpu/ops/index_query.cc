// Indexer queries (compressor.md 2.2, 2.4).
#include <cmath>

#include "backends/cpu/ops/rope.h"
#include "backends/cpu/ops/rowwise.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

IndexQuantise quantisation(KvFormat format) {
  switch (format) {
    case KvFormat::kIndexFp8:
      return IndexQuantise::kFp8Row;
    case KvFormat::kIndexMxfp4:
      return IndexQuantise::kMxfp4;
    default:
      return IndexQuantise::kNone;
  }
}

float weight_at(const ConstTensor& weights, int64_t t, int64_t h) {
  const void* element = row_at(weights, t, h);
  return weights.dtype == DType::kBf16 ? bf16_to_f32(*static_cast<const uint16_t*>(element))
                                       : *static_cast<const float*>(element);
}

}  // namespace

void index_query(const RowKernels& kernels, const IndexQueryParams& params,
                 const OpContext& context) {
  const int64_t tokens = params.q.shape[0], heads = params.q.shape[1], dim = params.q.shape[2];
  const IndexQuantise quantise = quantisation(params.format);
  // index_scale as its two factors: w * s_q * dim^-0.5 * heads^-0.5, each product rounded.
  const auto dim_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const auto heads_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(heads)));
  Arena::Scope scope(*context.scratch);
  const ThreadRows buffers(context, dim);
  parallel_heads(context.stream, tokens, heads,
                 [&](int64_t t, int64_t head_begin, int64_t head_end, int thread_idx) {
                   RopeAngles angles(params.rope);
                   const RopeTable& rope = angles.at(params.positions[t]);
                   auto* folded = static_cast<float*>(row_at(params.weights_out, t));
                   for (int64_t h = head_begin; h < head_end; ++h) {
                     const float scale = kernels.index_query(
                         row_at(params.q, t, h), params.q.dtype, dim, rope, params.hadamard,
                         quantise, buffers.of(thread_idx), row_at(params.q_out, t, h));
                     folded[h] =
                         weight_at(params.weights, t, h) * scale * dim_factor * heads_factor;
                   }
                 });
}

}  // namespace dsv4::cpu
