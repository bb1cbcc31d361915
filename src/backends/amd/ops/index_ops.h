// The indexer's operations over the kernels of index_logits.h and top_k.h; the launcher is that of
// gpu/rowwise_ops.h.
#pragma once
#include "backends/amd/ops/top_k.h"
#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4::amd {

template <typename Launch>
void top_k(const TopKParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  launch.template run<TopK>(params.logits.shape[0],
                            {.logits = params.logits.template as<float>(),
                             .logits_stride = params.logits.strides[0],
                             .end = params.end,
                             .indices = params.topk_indices.template as<int32_t>(),
                             .indices_stride = params.topk_indices.strides[0],
                             .length = params.topk_length,
                             .k = static_cast<int32_t>(params.topk_indices.shape[1])});
}

template <typename Launch>
void install_top_k(Ops& ops) {
  ops.top_k = top_k<Launch>;
}

}  // namespace dsv4::amd
