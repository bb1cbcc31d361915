// The model around attention: embedding, blocks of hyper-connections, attention and experts, head.
// Source: model.md 2-4.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "checkpoint/weights.h"
#include "dsv4/attention.h"

namespace dsv4 {

/// Makes the attention layer of the chosen backend.
using AttentionFactory = std::function<std::unique_ptr<DeepseekV4Attention>(const AttentionArgs&)>;

/// Scratch bounds of a whole model's operations.
ScratchLimits model_scratch_limits(const ModelConfig& config, const StepLimits& limits,
                                   int num_threads);

/// Workspace of one step of the whole model, known from the config alone. `padded_heads` as the
/// backend pads config.num_heads.
int64_t model_workspace_bytes(const ModelConfig& config, const Numerics& numerics,
                              const StepLimits& limits, int max_logits, int padded_heads,
                              const Ops& ops, int num_threads);

class Transformer {
 public:
  /// `weights` lie in memory that `device` reads and outlive this object.
  Transformer(const ModelConfig& config, ModelWeights weights, const Numerics& numerics,
              Device& device, const AttentionFactory& make_attention);

  std::vector<std::vector<CacheSpec>> cache_specs() const;
  /// Fixes the limits of steps; once, before forward().
  void prepare_for(const StepLimits& limits);

  /// One step: appends every token's KV to the caches, and computes logits of `num_logits` rows.
  /// @param token_ids    [num_tokens] i32 on the device, checked against the vocabulary by the
  /// caller.
  /// @param logit_rows   [num_logits] i32 on the device: tokens of the step whose logits are
  /// wanted.
  /// @param logits       [num_logits, vocab_size] f32.
  void forward(const StepPlan& plan, const KvCachePool& pool, const int32_t* token_ids,
               const int32_t* logit_rows, int64_t num_logits, Tensor logits, Workspace workspace,
               Stream stream, const ForwardOptions& options) const;

 private:
  const ModelConfig config_;
  ModelWeights weights_;
  Numerics numerics_;
  Device& device_;
  std::vector<std::unique_ptr<DeepseekV4Attention>> attention_;
  std::vector<Buffer> owned_;
  int64_t attention_workspace_bytes_ = 0;
};

}  // namespace dsv4
