// Stages made of single operations, for backends to call. Free functions: sharing them makes no
// class hierarchy.
#pragma once
#include "attention/layer.h"

namespace dsv4 {

/// step.q, caches, step.topk_* -> step.o by one `attend` operation over pages (attention.md step
/// 8).
void attend_pages(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                  const Ops& ops);

/// step.o -> out: inverse RoPE (FP8 groups, bf16 or f32 by layer.numerics.wo_a and by what wo_a is
/// stored as), grouped wo_a, wo_b (o_proj.md).
void project_out(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                 const Ops& ops, Tensor out);

}  // namespace dsv4
