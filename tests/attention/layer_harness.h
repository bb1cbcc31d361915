// One attention layer with everything around it, on any backend, for tests that construct layers
// themselves: tensor-parallel ranks, other backends, other geometries.
#pragma once
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "attention/layer.h"
#include "attention/selection.h"
#include "checkpoint/bind.h"
#include "core/numbers.h"
#include "dsv4/backend.h"
#include "dsv4/checkpoint.h"
#include "model/place_weights.h"

namespace dsv4::testing {

/// A small geometry with every kind of layer; head counts vary.
inline ModelConfig small_config(int num_heads, int o_groups) {
  ModelConfig config = ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
  config.num_heads = num_heads;
  config.o_groups = o_groups;
  return config;
}

/// A backend on the first device of its platform.
struct LayerTarget {
  std::string backend = "CPU_DSV4";
  std::string device = "cpu";
  const AttentionDescriptor& descriptor() const {
    for (const BackendEntry& entry : backends()) {
      if (entry.descriptor->name == backend) return *entry.descriptor;
    }
    fail(ErrorCode::kNotFound, "no backend ", backend);
  }
  bool is_emulated() const { return DeviceId::parse(device).index < 0; }
  /// Empty: it runs on this machine, with these products.
  std::string why_not(Products products = Products::kF32) const {
    return is_emulated() ? ""
                         : join_reasons(device_reasons(
                               descriptor(), target_of(DeviceId::parse(device)), products));
  }
  /// "cpu", "flashmla", ...: for names of tests.
  std::string label() const {
    const std::string cls(descriptor().class_name);
    return cls.substr(0, cls.find("Attention")) + (is_emulated() ? "Emulated" : "");
  }
};

inline void PrintTo(const LayerTarget& target, std::ostream* out) {
  *out << target.backend << " on " << target.device;
}

/// The CPU's backend, and those of GPUs that have kernels in this build.
inline std::vector<LayerTarget> layer_targets() {
  std::vector<LayerTarget> out;
  for (const BackendEntry& entry : backends()) {
    if (entry.create == nullptr || !entry.descriptor->not_built.empty()) continue;
    const Platform platform = entry.descriptor->platform;
    out.push_back({std::string(entry.descriptor->name), DeviceId{platform, 0}.str()});
  }
  return out;
}

/// AMD's backend on the executor: everywhere, thousands of times slower than a GPU.
inline LayerTarget emulated_target() {
  return {"ROCM_FLASHMLA_SPARSE_DSV4", "rocm:emulated"};
}

class LayerHarness {
 public:
  static constexpr int kThreads = 2;
  LayerHarness(ModelConfig config, int compress_ratio, const Numerics& numerics,
               const StepLimits& limits, TensorParallel tensor_parallel = {},
               const LayerTarget& target = {}, std::unique_ptr<Device> device = nullptr)
      : config_(std::move(config)),
        device_(device != nullptr ? std::move(device)
                                  : open_device(DeviceId::parse(target.device), kThreads)) {
    config_.num_hidden_layers = 1;
    config_.compress_ratios = {compress_ratio};
    const LayerKind kind = config_.layer_kind(0);
    const FormulaStorage storage =
        numerics.quantise_linear_input ? FormulaStorage::kReleased : FormulaStorage::kBf16Values;
    source_ = formula_source(expected_attention_tensors(config_, kind, "test."), 5, storage);
    weights_ =
        place_weights(bind_attention(*source_, config_, kind, "test."), *device_, owned_weights_);
    layer_ = create_attention(target.descriptor(), {.config = &config_,
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
    const int64_t row_bytes = config_.hidden_size * size_of(numerics.activation);
    hidden_ = device_->allocate(limits.max_tokens * row_bytes);
    out_ = device_->allocate(limits.max_tokens * row_bytes);
  }

  /// hidden [tokens, hidden_size] f32, rounded to the activation type; output widened to f32.
  std::vector<float> forward(SequenceId sequence, const std::vector<float>& hidden,
                             const ForwardOptions& options = {}) {
    const BatchEntry entry{sequence, num_tokens(hidden)};
    return forward({&entry, 1}, hidden, options);
  }
  /// Tokens of several sequences in one step, rows in batch order.
  std::vector<float> forward(std::span<const BatchEntry> batch, const std::vector<float>& hidden,
                             const ForwardOptions& options = {}) {
    return run(batch, hidden, false, [&](const Tensor& in, const Tensor& out, Stream stream) {
      layer_->forward(*plan_, pool_->caches(0), in, out, {workspace_.data(), workspace_.bytes()},
                      stream, options);
    });
  }
  /// As forward, through recorded work: the first call of a number of tokens runs as it is, the
  /// second one is recorded, later ones replay. The device must be able to record.
  std::vector<float> forward_recorded(SequenceId sequence, const std::vector<float>& hidden) {
    const BatchEntry entry{sequence, num_tokens(hidden)};
    return forward_recorded(std::span(&entry, 1), hidden);
  }
  std::vector<float> forward_recorded(std::span<const BatchEntry> batch,
                                      const std::vector<float>& hidden) {
    return run(batch, hidden, true, [&](const Tensor& in, const Tensor& out, Stream stream) {
      const auto eager = [&] {
        layer_->forward(*plan_, pool_->caches(0), in, out, {workspace_.data(), workspace_.bytes()},
                        stream);
      };
      const auto [at, is_first] = recorded_.try_emplace(in.shape[0]);
      if (is_first) return eager();
      if (at->second == nullptr) at->second = device_->record(stream, eager);
      at->second->launch(stream);
    });
  }

  /// Host copies of what the device holds.
  template <typename T>
  std::vector<T> download(const T* from, int64_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    if (count == 0) return out;
    device_->copy_to_host(out.data(), from, count * static_cast<int64_t>(sizeof(T)),
                          device_->default_stream());
    device_->synchronize(device_->default_stream());
    return out;
  }
  std::vector<std::byte> download(const CacheView& cache) {
    const int64_t last_page = page_bytes(cache.format, cache.rows_per_block, cache.row_elems);
    return download(cache.base, (cache.num_blocks - 1) * cache.block_stride_bytes + last_page);
  }

  const ModelConfig& config() const { return config_; }
  KvCachePool& pool() { return *pool_; }
  StepPlan& plan() { return *plan_; }
  Device& device() { return *device_; }
  DeepseekV4Attention& layer() { return *layer_; }
  Buffer& workspace() { return workspace_; }

 private:
  int32_t num_tokens(const std::vector<float>& hidden) const {
    return static_cast<int32_t>(static_cast<int64_t>(hidden.size()) / config_.hidden_size);
  }
  template <typename Body>
  std::vector<float> run(std::span<const BatchEntry> batch, const std::vector<float>& hidden,
                         bool for_recording, Body body) {
    const int64_t tokens = num_tokens(hidden);
    const DType act = layer_->numerics().activation;
    const bool f32 = act == DType::kF32;
    std::vector<float> out_f32(hidden.size());
    std::vector<Bf16> in_bf16(hidden.begin(), hidden.end()), out_bf16(hidden.size());
    const Stream stream = device_->default_stream();
    for (const BatchEntry& entry : batch) {
      EXPECT_TRUE(pool_->reserve(entry.sequence, entry.num_tokens));
    }
    plan_->update(batch, *pool_, stream, 0, for_recording);
    const Tensor in(hidden_.data(), act, {tokens, config_.hidden_size});
    const Tensor out(out_.data(), act, {tokens, config_.hidden_size});
    device_->copy_to_device(in.data, f32 ? static_cast<const void*>(hidden.data()) : in_bf16.data(),
                            in.num_bytes(), stream);
    body(in, out, stream);
    for (const BatchEntry& entry : batch) pool_->advance(entry.sequence, entry.num_tokens);
    device_->copy_to_host(f32 ? static_cast<void*>(out_f32.data()) : out_bf16.data(), out.data,
                          out.num_bytes(), stream);
    device_->synchronize(stream);
    if (!f32) out_f32.assign(out_bf16.begin(), out_bf16.end());
    return out_f32;
  }

  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<TensorSource> source_;
  std::vector<Buffer> owned_weights_;
  AttentionWeights weights_;
  std::unique_ptr<DeepseekV4Attention> layer_;
  std::unique_ptr<KvCachePool> pool_;
  std::unique_ptr<StepPlan> plan_;
  Buffer workspace_, hidden_, out_;
  std::map<int64_t, std::unique_ptr<RecordedWork>> recorded_;
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
