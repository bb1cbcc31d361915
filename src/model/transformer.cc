#include "model/transformer.h"

#include <algorithm>
#include <cstring>

#include "attention/layer.h"
#include "core/arena.h"
#include "model/place_weights.h"

namespace dsv4 {
namespace {

// Puts "layer<N>/" before every name.
class LayerTaps final : public TapSink {
 public:
  LayerTaps(TapSink* sink, int layer_idx) : sink_(sink), prefix_(concat("layer", layer_idx, "/")) {}
  void tap(std::string_view name, const ConstTensor& value) override {
    if (sink_ != nullptr) sink_->tap(prefix_ + std::string(name), value);
  }

 private:
  TapSink* sink_;
  std::string prefix_;
};

void tap_device(const ForwardOptions& options, Device& device, Stream stream, std::string_view name,
                const ConstTensor& value) {
  if (options.taps == nullptr) return;
  DSV4_CHECK(value.is_contiguous());
  std::vector<std::byte> host(static_cast<size_t>(value.num_bytes()));
  device.copy_to_host(host.data(), value.data, value.num_bytes(), stream);
  device.synchronize(stream);
  ConstTensor copy = value;
  copy.data = host.data();
  options.taps->tap(name, copy);
}

}  // namespace

ScratchLimits model_scratch_limits(const ModelConfig& config, const StepLimits& limits,
                                   int num_threads) {
  ScratchLimits out;
  out.max_tokens = limits.max_tokens;
  out.max_cols =
      std::max({config.hidden_size * config.hc_mult, config.q_lora_rank, config.group_width(),
                config.o_groups * config.o_lora_rank, config.moe_intermediate_size});
  out.max_rows = std::max({config.vocab_size, int64_t{config.num_heads} * config.head_dim,
                           config.o_groups * config.o_lora_rank, config.hidden_size});
  out.num_heads = config.num_heads;
  out.head_dim = config.head_dim;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const LayerKind kind = config.layer_kind(layer);
    if (!kind.indexer) continue;
    out.index_heads = config.index_n_heads;
    out.index_dim = config.index_head_dim;
    out.index_topk = config.index_topk;
  }
  const std::vector<int> ratios = config.distinct_ratios();
  if (!ratios.empty()) out.max_entries = limits.max_context / ratios.front();
  out.hidden_size = config.hidden_size;
  out.moe_intermediate = config.moe_intermediate_size;
  out.num_experts = config.n_routed_experts;
  out.experts_per_token = config.num_experts_per_tok;
  out.num_threads = num_threads;
  return out;
}

namespace {

struct Intermediates {
  Tensor streams;         // [T, hc, hidden] act
  Tensor x;               // [T, hidden] act: mixed, then normed
  Tensor f;               // [T, hidden] act: output of attention or experts
  Tensor post, comb;      // [T, hc], [T, hc, hc] f32
  Tensor router_logits;   // [T, experts] f32
  Tensor expert_ids;      // [T, k] i32
  Tensor expert_weights;  // [T, k] f32
  Tensor last_streams;    // [L, hc * hidden] act: the rows whose logits are wanted
  Tensor last;            // [L, hidden] act
  Tensor last_normed;     // [L, hidden] f32
};

Intermediates take_intermediates(const ModelConfig& config, const Numerics& numerics,
                                 int64_t tokens, int64_t num_logits, Arena& arena) {
  const DType act = numerics.activation;
  const int64_t hc = config.hc_mult, hidden = config.hidden_size, k = config.num_experts_per_tok;
  Intermediates out;
  out.streams = arena.take_tensor(act, {tokens, hc, hidden});
  out.x = arena.take_tensor(act, {tokens, hidden});
  out.f = arena.take_tensor(act, {tokens, hidden});
  out.post = arena.take_tensor(DType::kF32, {tokens, hc});
  out.comb = arena.take_tensor(DType::kF32, {tokens, hc, hc});
  out.router_logits = arena.take_tensor(DType::kF32, {tokens, config.n_routed_experts});
  out.expert_ids = arena.take_tensor(DType::kI32, {tokens, k});
  out.expert_weights = arena.take_tensor(DType::kF32, {tokens, k});
  out.last_streams = arena.take_tensor(act, {num_logits, hc * hidden});
  out.last = arena.take_tensor(act, {num_logits, hidden});
  out.last_normed = arena.take_tensor(DType::kF32, {num_logits, hidden});
  return out;
}

}  // namespace

int64_t model_workspace_bytes(const ModelConfig& config, const Numerics& numerics,
                              const StepLimits& limits, int max_logits, int padded_heads,
                              const Ops& ops, int num_threads) {
  Arena measure;
  take_intermediates(config, numerics, limits.max_tokens, max_logits, measure);
  int64_t borrowed = ops.scratch_bytes(model_scratch_limits(config, limits, num_threads));
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    borrowed =
        std::max(borrowed, attention_workspace_bytes(config, config.layer_kind(layer), numerics, {},
                                                     padded_heads, limits, ops, num_threads));
  }
  return measure.peak() + round_up(borrowed, Arena::kAlignment);
}

Transformer::Transformer(const ModelConfig& config, ModelWeights weights, const Numerics& numerics,
                         Device& device, const AttentionFactory& make_attention)
    : config_(config), weights_(std::move(weights)), numerics_(numerics), device_(device) {
  weights_ = place_weights(weights_, device_, owned_);
  std::set<std::string> names;
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    attention_.push_back(
        make_attention({.config = &config_,
                        .kind = config_.layer_kind(layer),
                        .name = concat("layers.", layer, ".attn"),
                        .weights = &weights_.layers[static_cast<size_t>(layer)].attn,
                        .numerics = numerics_,
                        .tensor_parallel = {},
                        .device = &device_,
                        .names = &names}));
  }
}

std::vector<std::vector<CacheSpec>> Transformer::cache_specs() const {
  std::vector<std::vector<CacheSpec>> out;
  for (const auto& layer : attention_)
    out.emplace_back(layer->cache_specs().begin(), layer->cache_specs().end());
  return out;
}

void Transformer::prepare_for(const StepLimits& limits) {
  attention_workspace_bytes_ = 0;
  for (const auto& layer : attention_) {
    layer->prepare_for(limits);
    attention_workspace_bytes_ =
        std::max(attention_workspace_bytes_, layer->workspace_bytes(limits));
  }
}

void Transformer::forward(const StepPlan& plan, const KvCachePool& pool, const int32_t* token_ids,
                          const int32_t* logit_rows, int64_t num_logits, Tensor logits,
                          Workspace workspace, Stream stream, const ForwardOptions& options) const {
  const int64_t tokens = plan.view().num_tokens;
  const Ops& ops = device_.ops();
  Arena arena(workspace.data, workspace.bytes);
  const OpContext context{stream, &arena, &ops};
  const Intermediates buffers = take_intermediates(config_, numerics_, tokens, num_logits, arena);
  const float norm_eps = config_.rms_norm_eps, hc_eps = config_.hc_eps;

  // One site of hyper-connections: mix the streams, norm, run `body` from x to f, spread f again.
  const auto site = [&](const HcWeights& hc, const ConstTensor& norm, auto&& body) {
    ops.hc_pre({.streams = buffers.streams,
                .weights = hc,
                .norm_eps = norm_eps,
                .hc_eps = hc_eps,
                .sinkhorn_iters = config_.hc_sinkhorn_iters,
                .y = buffers.x,
                .post = buffers.post,
                .comb = buffers.comb},
               context);
    ops.rms_norm({.x = buffers.x, .weight = norm, .eps = norm_eps, .out = buffers.x}, context);
    body();
    ops.hc_post(
        {.f = buffers.f, .post = buffers.post, .comb = buffers.comb, .streams = buffers.streams},
        context);
  };

  ops.embed({.ids = token_ids, .table = weights_.embed, .streams = buffers.streams}, context);
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const BlockWeights& block = weights_.layers[static_cast<size_t>(layer)];
    LayerTaps taps(options.taps, layer);
    const ForwardOptions layer_options{options.taps == nullptr ? nullptr : &taps, options.observer};
    site(block.hc_attn, block.attn_norm, [&] {
      Arena::Scope scope(arena);
      const Workspace borrowed{arena.take(attention_workspace_bytes_), attention_workspace_bytes_};
      attention_[static_cast<size_t>(layer)]->forward(plan, pool.caches(layer), buffers.x,
                                                      buffers.f, borrowed, stream, layer_options);
    });
    site(block.hc_ffn, block.ffn_norm, [&] {
      const LinearProblem gate{buffers.x, block.ffn.gate, buffers.router_logits};
      ops.linear({.problems = {&gate, 1}, .quantise_input = false}, context);
      ops.route({.logits = buffers.router_logits,
                 .bias = block.ffn.bias,
                 .tid2eid = block.ffn.tid2eid,
                 .token_ids = token_ids,
                 .scaling = config_.routed_scaling_factor,
                 .expert_ids = buffers.expert_ids,
                 .expert_weights = buffers.expert_weights},
                context);
      ops.moe({.x = buffers.x,
               .expert_ids = buffers.expert_ids,
               .expert_weights = buffers.expert_weights,
               .experts = block.ffn.experts,
               .shared = block.ffn.shared,
               .swiglu_limit = config_.swiglu_limit,
               .quantise_input = numerics_.quantise_linear_input,
               .out = buffers.f},
              context);
    });
    tap_device(layer_options, device_, stream, "expert_ids", buffers.expert_ids);
    tap_device(layer_options, device_, stream, "expert_weights", buffers.expert_weights);
    tap_device(layer_options, device_, stream, "mlp_out", buffers.f);
    tap_device(layer_options, device_, stream, "streams_out", buffers.streams);
  }
  if (num_logits == 0) return;

  Tensor flat_streams(buffers.streams.data, buffers.streams.dtype,
                      {tokens, buffers.last_streams.shape[1]});
  ops.gather_rows({.x = flat_streams, .rows = logit_rows, .out = buffers.last_streams}, context);
  const Tensor last_streams(buffers.last_streams.data, buffers.last_streams.dtype,
                            {num_logits, config_.hc_mult, config_.hidden_size});
  ops.hc_head({.streams = last_streams,
               .weights = weights_.hc_head,
               .norm_eps = norm_eps,
               .hc_eps = hc_eps,
               .y = buffers.last},
              context);
  ops.rms_norm(
      {.x = buffers.last, .weight = weights_.norm, .eps = norm_eps, .out = buffers.last_normed},
      context);
  const LinearProblem head{buffers.last_normed, weights_.head, logits};
  ops.linear({.problems = {&head, 1}, .quantise_input = false}, context);
}

}  // namespace dsv4
