// Tensors by name -> weights by role. Called once after loading.
#pragma once
#include <string>

#include "checkpoint/weights.h"
#include "dsv4/checkpoint.h"

namespace dsv4 {

/// Weights of one attention layer: tensors prefix + "wq_a.weight" and so on. Views into `source`,
/// which must outlive them. Scales are attached where the weight is kF8E4M3 or kF4E2M1; bf16 and
/// f32 weights need none.
/// @throws Error kNotFound; kInvalidArgument: a shape or dtype that does not fit `config`
/// (released checkpoints were checked by open_checkpoint; other sources are checked here);
/// kUnsupported: scale blocks of wo_a that straddle output groups.
AttentionWeights bind_attention(const TensorSource& source, const ModelConfig& config,
                                const LayerKind& kind, const std::string& prefix);

/// Weights of the whole model. `mtp` stays empty when the source holds no tensor of it, as
/// checkpoints with Hugging Face names do.
ModelWeights bind_model(const TensorSource& source, const ModelConfig& config);

}  // namespace dsv4
