// The description of a model: config.json, parsed once, validated once, immutable. Every derived
// number is a method here; nobody else reads the file.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

/// Frequencies of the rotary embedding of one layer kind. Source: spec/attention.md 3.
struct RopeParameters {
  double theta = 10000.0;
  bool yarn = false;  ///< the fields below are used only then
  double factor = 1.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  int64_t original_max_position = 0;
};

/// What distinguishes layers: separate data, so that a later family member needs no new code path.
struct LayerKind {
  int compress_ratio = 0;  ///< tokens per compressed entry; 0: no compressed cache
  bool overlap = false;    ///< each entry also pools the window before its own (coff = 2)
  bool indexer =
      false;  ///< entries are selected by score; otherwise all visible ones are attended to
  RopeParameters rope;
  /// Windows pooled per entry: 2 with overlap, else 1.
  int pooled_windows() const { return overlap ? 2 : 1; }
  /// Tokens pooled per entry = rows of compressor state to keep.
  int pooled_tokens() const { return pooled_windows() * compress_ratio; }
  /// "sliding", "csa" or "hca".
  const char* name() const { return compress_ratio == 0 ? "sliding" : indexer ? "csa" : "hca"; }
};

enum class ExpertFormat : uint8_t { kFp4, kFp8, kBf16 };

/// Field names are those of config.json (`num_attention_heads` is `num_heads`). Source:
/// spec/model.md 1.
struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int num_hidden_layers = 0;
  int num_heads = 0;
  int head_dim = 0;
  int qk_rope_head_dim = 0;
  int64_t q_lora_rank = 0;
  int64_t o_lora_rank = 0;
  int o_groups = 0;
  int sliding_window = 0;
  std::vector<int> compress_ratios;  ///< per layer, then up to 3 for MTP layers; 1 is read as 0
  double rope_theta = 0;
  double compress_rope_theta = 0;
  double rope_factor = 1;
  double rope_beta_fast = 32;
  double rope_beta_slow = 1;
  int64_t rope_original_max_position = 0;
  int64_t max_position_embeddings = 0;
  int index_n_heads = 0;
  int index_head_dim = 0;
  int index_topk = 0;
  int n_routed_experts = 0;
  int n_shared_experts = 0;
  int num_experts_per_tok = 0;
  int64_t moe_intermediate_size = 0;
  int num_hash_layers = 0;
  float routed_scaling_factor = 1;
  float swiglu_limit = 0;
  int hc_mult = 0;
  int hc_sinkhorn_iters = 0;
  float hc_eps = 0;
  float rms_norm_eps = 0;
  int num_nextn_predict_layers = 0;
  ExpertFormat expert_dtype = ExpertFormat::kFp4;
  int weight_block_rows = 128;
  int weight_block_cols = 128;
  int bos_token_id = 0;
  int eos_token_id = 1;

  /// Parses and validates; `origin` names the source in messages.
  /// @throws Error kInvalidArgument or kDataCorrupt: one error that lists every inconsistency.
  static ModelConfig parse(std::string_view json, const std::string& origin);
  /// `path` is a config.json or a folder that holds one. @throws Error kNotFound, and as parse().
  static ModelConfig load(const std::string& path);

  int nope_head_dim() const { return head_dim - qk_rope_head_dim; }
  float softmax_scale() const;  ///< head_dim^-0.5
  float index_scale() const;    ///< (index_n_heads * index_head_dim)^-0.5
  int heads_per_group() const { return num_heads / o_groups; }
  int64_t group_width() const { return int64_t{heads_per_group()} * head_dim; }
  /// Rows of hc_{attn,ffn}_fn: pre, post and the n x n combination.
  int hc_mix_rows() const { return (2 + hc_mult) * hc_mult; }
  /// Layers [0, num_hidden_layers) and MTP layers after them (always sliding).
  LayerKind layer_kind(int layer_idx) const;
  bool is_hash_layer(int layer_idx) const { return layer_idx < num_hash_layers; }
  /// Distinct compress ratios > 0 of the main layers, ascending.
  std::vector<int> distinct_ratios() const;
  bool operator==(const ModelConfig&) const = default;
};

}  // namespace dsv4
