#include "checkpoint/names.h"

#include <charconv>

namespace dsv4 {
namespace {

struct Pair {
  std::string_view released, hugging_face;
};

// Longest prefixes first where one is the beginning of another.
constexpr Pair kBelowLayer[] = {
    {"attn_norm.", "input_layernorm."},
    {"ffn_norm.", "post_attention_layernorm."},
    {"hc_attn_", "attn_hc."},
    {"hc_ffn_", "ffn_hc."},
    {"attn.attn_sink", "self_attn.sinks"},
    {"attn.wq_a.", "self_attn.q_a_proj."},
    {"attn.q_norm.", "self_attn.q_a_norm."},
    {"attn.wq_b.", "self_attn.q_b_proj."},
    {"attn.wkv.", "self_attn.kv_proj."},
    {"attn.kv_norm.", "self_attn.kv_norm."},
    {"attn.wo_a.", "self_attn.o_a_proj."},
    {"attn.wo_b.", "self_attn.o_b_proj."},
    {"attn.compressor.wkv.", "self_attn.compressor.kv_proj."},
    {"attn.compressor.wgate.", "self_attn.compressor.gate_proj."},
    {"attn.compressor.ape", "self_attn.compressor.position_bias"},
    {"attn.compressor.norm.", "self_attn.compressor.kv_norm."},
    {"attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."},
    {"attn.indexer.weights_proj.", "self_attn.compressor.indexer.weights_proj."},
    {"attn.indexer.compressor.wkv.", "self_attn.compressor.indexer.kv_proj."},
    {"attn.indexer.compressor.wgate.", "self_attn.compressor.indexer.gate_proj."},
    {"attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"},
    {"attn.indexer.compressor.norm.", "self_attn.compressor.indexer.kv_norm."},
    {"ffn.gate.weight", "mlp.gate.weight"},
    {"ffn.gate.bias", "mlp.gate.e_score_correction_bias"},
    {"ffn.gate.tid2eid", "mlp.gate.tid2eid"},
    {"ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."},
    {"ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."},
    {"ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."},
};
constexpr Pair kTopLevel[] = {
    {"embed.weight", "model.embed_tokens.weight"},
    {"head.weight", "lm_head.weight"},
    {"norm.weight", "model.norm.weight"},
    {"hc_head_", "model.hc_head.hc_"},
};
constexpr std::string_view kReleasedLayers = "layers.";
constexpr std::string_view kScale = "scale";

std::string replace_prefix(std::string_view name, const Pair& pair) {
  std::string out(pair.hugging_face);
  out += name.substr(pair.released.size());
  return out;
}

}  // namespace

std::vector<std::string> hugging_face_names(std::string_view released) {
  for (const Pair& pair : kTopLevel) {
    if (released.starts_with(pair.released)) return {replace_prefix(released, pair)};
  }
  if (!released.starts_with(kReleasedLayers)) return {};
  const size_t dot = released.find('.', kReleasedLayers.size());
  if (dot == std::string_view::npos) return {};
  const std::string layer = "model." + std::string(released.substr(0, dot + 1));
  const std::string_view rest = released.substr(dot + 1);
  for (const Pair& pair : kBelowLayer) {
    if (!rest.starts_with(pair.released)) continue;
    const std::string name = layer + replace_prefix(rest, pair);
    // hc_*_scale are parameters of their own, not scales of a matrix.
    if (!rest.ends_with(".scale")) return {name};
    const std::string stem = name.substr(0, name.size() - kScale.size());
    return {stem + "weight_scale_inv", stem + "weight_scale"};
  }
  return {};
}

std::optional<StackedExperts> parse_stacked_experts(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view rest = name.substr(kPrefix.size());
  StackedExperts out{};
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), out.layer);
  if (error != std::errc{} || out.layer < 0) return std::nullopt;
  const std::string_view tail = rest.substr(static_cast<size_t>(end - rest.data()));
  out.gate_up = tail == ".mlp.experts.gate_up_proj";
  if (!out.gate_up && tail != ".mlp.experts.down_proj") return std::nullopt;
  return out;
}

}  // namespace dsv4
