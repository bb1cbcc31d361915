// One attention layer with everything around it, for tests that construct layers themselves:
// tensor-parallel ranks, other backends, other geometries.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attention/layer.h"
#include "backends/cpu/cpu_attention.h"
#include "backends/cpu/cpu_device.h"
#include "checkpoint/bind.h"
#include "core/numbers.h"
#include "dsv4/checkpoint.h"

namespace dsv4::testing {

/// A small geometry with every kind of layer; head counts vary.
inline ModelConfig small_config(int num_heads, int o_groups) {
  ModelConfig config = ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
  config.num_heads = num_heads;
  config.o_groups = o_groups;
  return config;
}

using LayerFactory = std::unique_ptr<DeepseekV4Attention> (*)(const AttentionArgs&);

class LayerHarness {
 public:
  LayerHarness(ModelConfig config, int compress_ratio, const Numerics& numerics,
               const StepLimits& limits, TensorParallel tensor_parallel = {},
               LayerFactory factory = cpu::CpuAttention::create, int threads = 2)
      : config_(std::move(config)), device_(cpu::open_cpu_device(threads)) {
    config_.num_hidden_layers = 1;
    config_.compress_ratios = {compress_ratio};
    const LayerKind kind = config_.layer_kind(0);
    const FormulaStorage storage =
        numerics.quantise_linear_input ? FormulaStorage::kReleased : FormulaStorage::kBf16Values;
    source_ = formula_source(expected_attention_tensors(config_, kind, "test."), 5, storage);
    weights_ = bind_attention(*source_, config_, kind, "test.");
    layer_ = factory({.config = &config_,
                      .kind = kind,
                      .name = "test",
                      .weights = &weights_,
                      .numerics = numerics,
                      .tensor_parallel = tensor_parallel,
                      .device = device_.get(),
                      .names = nullptr});
    layer_->prepare_for(limits);
    const PoolLimits pool_limits{.total_tokens = limits.max_context * limits.max_seqs,
                                 .max_seqs = limits.max_seqs,
                                 .max_step_tokens = limits.max_tokens,
                                 .window_block_tokens = 64,
                                 .growing_block_tokens = 256};
    const auto specs = layer_->cache_specs();
    pool_ = std::make_unique<KvCachePool>(
        std::vector<std::vector<CacheSpec>>{{specs.begin(), specs.end()}}, pool_limits, *device_);
    plan_ = std::make_unique<StepPlan>(config_, limits, pool_limits, *device_);
    workspace_ = device_->allocate(layer_->workspace_bytes(limits));
  }

  /// hidden [tokens, hidden_size] f32, rounded to the activation type; output widened to f32.
  std::vector<float> forward(SequenceId sequence, const std::vector<float>& hidden,
                             const ForwardOptions& options = {}) {
    const int64_t tokens = static_cast<int64_t>(hidden.size()) / config_.hidden_size;
    const DType act = layer_->numerics().activation;
    std::vector<float> in_f32(hidden), out_f32(hidden.size());
    std::vector<Bf16> in_bf16(hidden.begin(), hidden.end()), out_bf16(hidden.size());
    const bool f32 = act == DType::kF32;
    const BatchEntry entry{sequence, static_cast<int32_t>(tokens)};
    EXPECT_TRUE(pool_->reserve(sequence, tokens));
    plan_->update({&entry, 1}, *pool_, device_->default_stream());
    layer_->forward(*plan_, pool_->caches(0),
                    ConstTensor(f32 ? static_cast<void*>(in_f32.data()) : in_bf16.data(), act,
                                {tokens, config_.hidden_size}),
                    Tensor(f32 ? static_cast<void*>(out_f32.data()) : out_bf16.data(), act,
                           {tokens, config_.hidden_size}),
                    {workspace_.data(), workspace_.bytes()}, device_->default_stream(), options);
    pool_->advance(sequence, tokens);
    if (!f32) out_f32.assign(out_bf16.begin(), out_bf16.end());
    return out_f32;
  }

  const ModelConfig& config() const { return config_; }
  KvCachePool& pool() { return *pool_; }
  StepPlan& plan() { return *plan_; }
  Device& device() { return *device_; }
  DeepseekV4Attention& layer() { return *layer_; }
  Buffer& workspace() { return workspace_; }

 private:
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<TensorSource> source_;
  AttentionWeights weights_;
  std::unique_ptr<DeepseekV4Attention> layer_;
  std::unique_ptr<KvCachePool> pool_;
  std::unique_ptr<StepPlan> plan_;
  Buffer workspace_;
};

/// Inputs by formula, rounded to bf16.
inline std::vector<float> formula_hidden(int64_t tokens, int64_t hidden_size, uint64_t seed) {
  std::vector<float> out(static_cast<size_t>(tokens * hidden_size));
  const uint64_t key = formula_key("x", seed);
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = round_bf16(static_cast<float>(1.75 * formula_uniform(key, i)));
  return out;
}

}  // namespace dsv4::testing
