// Stages made of single operations, for backends to call. Free functions: sharing them makes no
// class hierarchy.
#pragma once
#include "attention/layer.h"

namespace dsv4 {

/// What `attend` is told of a step: window rows as ranges; compressed ones as ranges, or padded
/// lists where the indexer left some out (attention.md step 8).
AttendParams attend_params(const DeepseekV4Attention::Step& step,
                           const DeepseekV4Attention::Layer& layer);

/// Whether attend_pages takes step.q as wq_b leaves it (step.attend_norms): asked by backends that
/// attend so, before the base class prepares the step. Not where somebody watches the steps.
bool attend_norms_queries(const DeepseekV4Attention::Step& step,
                          const DeepseekV4Attention::Layer& layer, const Ops& ops);

/// step.q, caches, step.topk_* -> step.o by one `attend` operation over pages; or the codes of
/// step.o_rotated (step.attend_rotates), which project_out with the layer's own wo_a reads.
void attend_pages(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                  const Ops& ops);

/// step.o -> out: inverse RoPE (FP8 groups, bf16 or f32 by layer.numerics.wo_a and by what `wo_a`
/// is stored as), grouped wo_a, wo_b (o_proj.md). `wo_a` is the layer's, or another form of it.
void project_out(DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                 const Ops& ops, const Weight& wo_a, Tensor out);

}  // namespace dsv4
