#include "tests/oracle/model.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

namespace oracle {
namespace {

HyperWeights read_hyper(const Tensors& tensors, const std::string& prefix) {
  return {tensors.weight(prefix + "_fn"), tensors.weight(prefix + "_base"),
          tensors.weight(prefix + "_scale")};
}

CompressorWeights read_compressor(const Tensors& tensors, const std::string& prefix) {
  return {tensors.weight(prefix + "wkv.weight"), tensors.weight(prefix + "wgate.weight"),
          tensors.weight(prefix + "ape"), tensors.weight(prefix + "norm.weight")};
}

ExpertWeights read_expert(const Tensors& tensors, const std::string& prefix) {
  return {tensors.weight(prefix + "w1.weight"), tensors.weight(prefix + "w2.weight"),
          tensors.weight(prefix + "w3.weight")};
}

Matrix as_row(std::span<const double> values) {
  Matrix out(1, static_cast<int64_t>(values.size()));
  out.values.assign(values.begin(), values.end());
  return out;
}

std::vector<int64_t> all_positions(size_t count) {
  std::vector<int64_t> out(count);
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace

ModelShape read_shape(const std::string& folder) {
  std::ifstream file(folder + "/config.json");
  if (!file) throw std::runtime_error(folder + ": no config.json");
  const nlohmann::json config = nlohmann::json::parse(file);
  ModelShape shape;
  shape.vocab_size = config.at("vocab_size");
  shape.hidden_size = config.at("hidden_size");
  shape.num_layers = config.at("num_hidden_layers");
  shape.hc_mult = config.at("hc_mult");
  shape.sinkhorn_iters = config.at("hc_sinkhorn_iters");
  shape.num_experts = config.at("n_routed_experts");
  shape.experts_per_token = config.at("num_experts_per_tok");
  shape.num_hash_layers = config.at("num_hash_layers");
  shape.hc_eps = config.at("hc_eps");
  shape.eps = config.at("rms_norm_eps");
  shape.routed_scaling = config.at("routed_scaling_factor");
  shape.swiglu_limit = config.at("swiglu_limit");
  const nlohmann::json& scaling = config.at("rope_scaling");
  for (int i = 0; i < shape.num_layers; ++i) {
    AttentionShape layer;
    layer.num_heads = config.at("num_attention_heads");
    layer.head_dim = config.at("head_dim");
    layer.rope_dim = config.at("qk_rope_head_dim");
    layer.groups = config.at("o_groups");
    layer.window = config.at("sliding_window");
    layer.ratio = config.at("compress_ratios").at(static_cast<size_t>(i));
    layer.index_heads = config.at("index_n_heads");
    layer.index_dim = config.at("index_head_dim");
    layer.index_topk = config.at("index_topk");
    layer.eps = shape.eps;
    RopeSpec rope;
    if (layer.ratio != 0) {
      rope = {config.at("compress_rope_theta"),
              true,
              scaling.at("factor"),
              scaling.at("beta_fast"),
              scaling.at("beta_slow"),
              scaling.at("original_max_position_embeddings")};
    } else {
      rope.theta = config.at("rope_theta");
    }
    layer.frequencies = rope_frequencies(rope, layer.rope_dim);
    shape.layers.push_back(layer);
  }
  return shape;
}

LayerWeights read_layer(const Tensors& tensors, const ModelShape& shape, int layer) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  const std::string attn = prefix + "attn.", ffn = prefix + "ffn.";
  LayerWeights out;
  out.attn_norm = tensors.weight(prefix + "attn_norm.weight");
  out.ffn_norm = tensors.weight(prefix + "ffn_norm.weight");
  out.hc_attn = read_hyper(tensors, prefix + "hc_attn");
  out.hc_ffn = read_hyper(tensors, prefix + "hc_ffn");
  AttentionWeights& attention = out.attention;
  attention.wq_a = tensors.weight(attn + "wq_a.weight");
  attention.q_norm = tensors.weight(attn + "q_norm.weight");
  attention.wq_b = tensors.weight(attn + "wq_b.weight");
  attention.wkv = tensors.weight(attn + "wkv.weight");
  attention.kv_norm = tensors.weight(attn + "kv_norm.weight");
  attention.attn_sink = tensors.weight(attn + "attn_sink");
  attention.wo_a = tensors.weight(attn + "wo_a.weight");
  attention.wo_b = tensors.weight(attn + "wo_b.weight");
  const AttentionShape& kind = shape.layers[static_cast<size_t>(layer)];
  if (kind.ratio != 0) attention.compressor = read_compressor(tensors, attn + "compressor.");
  if (kind.indexer()) {
    attention.indexer.wq_b = tensors.weight(attn + "indexer.wq_b.weight");
    attention.indexer.weights_proj = tensors.weight(attn + "indexer.weights_proj.weight");
    attention.indexer.compressor = read_compressor(tensors, attn + "indexer.compressor.");
  }
  out.gate = tensors.weight(ffn + "gate.weight");
  if (layer < shape.num_hash_layers) {
    out.tid2eid = tensors.integers(ffn + "gate.tid2eid");
  } else {
    out.gate_bias = tensors.weight(ffn + "gate.bias");
  }
  for (int e = 0; e < shape.num_experts; ++e) {
    out.experts.push_back(read_expert(tensors, ffn + "experts." + std::to_string(e) + "."));
  }
  out.shared = read_expert(tensors, ffn + "shared_experts.");
  return out;
}

Vector expert(std::span<const double> x, const ExpertWeights& weights, double weight, double limit,
              const Roundings& roundings) {
  Roundings keep_output = roundings;  // gate, up and the result stay fp32
  keep_output.bf16_activations = false;
  const Matrix input = as_row(x);
  const Matrix gate = rounded_linear(input, weights.w1, keep_output);
  const Matrix up = rounded_linear(input, weights.w3, keep_output);
  Matrix a(1, gate.cols);
  for (int64_t k = 0; k < a.cols; ++k) {
    a.values[k] = swiglu(gate.values[k], up.values[k], limit) * weight;
  }
  round_activations(a.values, roundings);
  return rounded_linear(a, weights.w2, keep_output).values;
}

Matrix moe(const Matrix& x, const std::vector<Route>& routes, const LayerWeights& weights,
           const ModelShape& shape, const Roundings& roundings) {
  Matrix out(x.rows, x.cols);
  for (int64_t t = 0; t < x.rows; ++t) {
    const auto add = [&](const ExpertWeights& which, double weight) {
      const Vector y = expert(x.row(t), which, weight, shape.swiglu_limit, roundings);
      for (int64_t k = 0; k < x.cols; ++k) out.row(t)[k] += y[k];
    };
    add(weights.shared, 1.0);
    for (size_t k = 0; k < routes[t].ids.size(); ++k) {
      add(weights.experts[routes[t].ids[k]], routes[t].weights[k]);
    }
  }
  round_activations(out.values, roundings);
  return out;
}

Model::Model(const std::string& folder) : shape_(read_shape(folder)), tensors_(folder) {
  for (int i = 0; i < shape_.num_layers; ++i) layers_.push_back(read_layer(tensors_, shape_, i));
}

ModelTrace Model::forward(const std::vector<int64_t>& ids, const std::vector<int64_t>& positions,
                          const Roundings& roundings) const {
  ModelTrace trace;
  const auto tokens = static_cast<int64_t>(ids.size());
  const Matrix embed = tensors_.matrix("embed.weight");
  std::vector<Matrix> streams;
  for (int64_t id : ids) {
    Matrix copies(shape_.hc_mult, shape_.hidden_size);
    for (int64_t i = 0; i < copies.rows; ++i) {
      std::ranges::copy(embed.row(id), copies.row(i).begin());
    }
    streams.push_back(std::move(copies));
  }

  // One half of a block (model.md 3): mix the streams, norm, f, spread the result.
  std::vector<HyperMix> mixes(ids.size());
  const auto mix_in = [&](const HyperWeights& hyper, const Weight& norm) {
    Matrix y(tokens, shape_.hidden_size);
    for (int64_t t = 0; t < tokens; ++t) {
      mixes[t] = hc_pre(streams[t], hyper, shape_.eps, shape_.hc_eps, shape_.sinkhorn_iters);
      round_activations(mixes[t].y, roundings);
      std::ranges::copy(mixes[t].y, y.row(t).begin());
      rms_norm(y.row(t), norm.values, shape_.eps);
    }
    round_activations(y.values, roundings);
    return y;
  };
  const auto mix_out = [&](const Matrix& f) {
    for (int64_t t = 0; t < tokens; ++t) {
      streams[t] = hc_post(f.row(t), mixes[t], streams[t]);
      round_activations(streams[t].values, roundings);
    }
  };

  for (size_t i = 0; i < layers_.size(); ++i) {
    const LayerWeights& weights = layers_[i];
    LayerTrace layer;
    layer.attn_in = mix_in(weights.hc_attn, weights.attn_norm);
    layer.attention = attention(layer.attn_in, all_positions(ids.size()), weights.attention,
                                shape_.layers[i], roundings);
    mix_out(layer.attention.out);
    const Matrix x = mix_in(weights.hc_ffn, weights.ffn_norm);
    const Matrix router_logits = linear(x, weights.gate);
    for (int64_t t = 0; t < tokens; ++t) {
      std::span<const int64_t> fixed;
      if (!weights.tid2eid.empty()) {
        fixed = std::span(weights.tid2eid)
                    .subspan(static_cast<size_t>(ids[t] * shape_.experts_per_token),
                             static_cast<size_t>(shape_.experts_per_token));
      }
      layer.routes.push_back(route(router_logits.row(t), weights.gate_bias.values, fixed,
                                   shape_.experts_per_token, shape_.routed_scaling));
    }
    layer.mlp_out = moe(x, layer.routes, weights, shape_, roundings);
    mix_out(layer.mlp_out);
    layer.streams_out = streams;
    trace.layers.push_back(std::move(layer));
  }

  // Head (model.md 2): its input stays unrounded after the norm, the product is fp32.
  const HyperWeights head = read_hyper(tensors_, "hc_head");
  const Weight norm = tensors_.weight("norm.weight");
  Matrix y(static_cast<int64_t>(positions.size()), shape_.hidden_size);
  for (size_t i = 0; i < positions.size(); ++i) {
    Vector mixed = hc_head(streams[positions[i]], head, shape_.eps, shape_.hc_eps);
    round_activations(mixed, roundings);
    rms_norm(mixed, norm.values, shape_.eps);
    std::ranges::copy(mixed, y.row(static_cast<int64_t>(i)).begin());
  }
  trace.logits = linear(y, tensors_.weight("head.weight"));
  return trace;
}

}  // namespace oracle
