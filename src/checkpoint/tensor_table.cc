// The tensors of a released checkpoint, derived from the config. Source: spec/model.md 6.
#include "core/checked_math.h"
#include "core/fail.h"
#include "dsv4/checkpoint.h"

namespace dsv4 {

int64_t ExpectedTensor::num_bytes() const {
  int64_t bytes = size_of(dtype);
  for (int64_t extent : shape) bytes *= extent;
  return bytes;
}

namespace {

class Table {
 public:
  Table(const ModelConfig& config, std::vector<ExpectedTensor>& out) : config_(config), out_(out) {}

  void add(const std::string& name, std::vector<int64_t> shape, DType dtype,
           const std::string& meaning) {
    out_.push_back({name, std::move(shape), dtype, meaning, 0, 0});
  }
  void bf16(const std::string& name, std::vector<int64_t> shape, const std::string& meaning) {
    add(name, std::move(shape), DType::kBf16, meaning);
  }
  void f32(const std::string& name, std::vector<int64_t> shape, const std::string& meaning) {
    add(name, std::move(shape), DType::kF32, meaning);
  }
  void scale(const std::string& stem, int64_t rows, int64_t cols, int block_rows, int block_cols,
             const std::string& meaning) {
    out_.push_back({stem + ".scale",
                    {ceil_div(rows, block_rows), ceil_div(cols, block_cols)},
                    DType::kF8E8M0,
                    concat(block_rows, " x ", block_cols, " blocks of ", meaning),
                    block_rows,
                    block_cols});
  }
  /// stem.weight [rows, cols] and its block scales.
  void fp8(const std::string& stem, int64_t rows, int64_t cols, const std::string& meaning) {
    add(stem + ".weight", {rows, cols}, DType::kF8E4M3, meaning);
    scale(stem, rows, cols, config_.weight_block_rows, config_.weight_block_cols, meaning);
  }
  void expert_matrix(const std::string& stem, int64_t rows, int64_t cols,
                     const std::string& meaning) {
    switch (config_.expert_dtype) {
      case ExpertFormat::kFp4:
        add(stem + ".weight", {rows, cols / 2}, DType::kF4E2M1, meaning + " / 2");
        scale(stem, rows, cols, 1, 32, meaning);
        break;
      case ExpertFormat::kFp8:
        fp8(stem, rows, cols, meaning);
        break;
      case ExpertFormat::kBf16:
        bf16(stem + ".weight", {rows, cols}, meaning);
        break;
    }
  }

  void compressor(const std::string& prefix, const LayerKind& kind, int64_t width,
                  const std::string& width_name) {
    const int64_t rows = kind.pooled_windows() * width;
    const std::string rows_name = (kind.overlap ? "2 * " : "") + width_name;
    bf16(prefix + "wkv.weight", {rows, config_.hidden_size}, rows_name + " x hidden_size");
    bf16(prefix + "wgate.weight", {rows, config_.hidden_size}, rows_name + " x hidden_size");
    f32(prefix + "ape", {kind.compress_ratio, rows}, "compress_ratio x " + rows_name);
    bf16(prefix + "norm.weight", {width}, width_name);
  }
  void attention(const std::string& prefix, const LayerKind& kind) {
    const ModelConfig& c = config_;
    const int64_t o_rows = c.o_groups * c.o_lora_rank;
    f32(prefix + "attn_sink", {c.num_heads}, "num_attention_heads");
    fp8(prefix + "wq_a", c.q_lora_rank, c.hidden_size, "q_lora_rank x hidden_size");
    bf16(prefix + "q_norm.weight", {c.q_lora_rank}, "q_lora_rank");
    fp8(prefix + "wq_b", int64_t{c.num_heads} * c.head_dim, c.q_lora_rank,
        "num_attention_heads * head_dim x q_lora_rank");
    fp8(prefix + "wkv", c.head_dim, c.hidden_size, "head_dim x hidden_size");
    bf16(prefix + "kv_norm.weight", {c.head_dim}, "head_dim");
    fp8(prefix + "wo_a", o_rows, c.group_width(),
        "o_groups * o_lora_rank x num_attention_heads * head_dim / o_groups");
    fp8(prefix + "wo_b", c.hidden_size, o_rows, "hidden_size x o_groups * o_lora_rank");
    if (kind.compress_ratio == 0) return;
    compressor(prefix + "compressor.", kind, c.head_dim, "head_dim");
    if (!kind.indexer) return;
    fp8(prefix + "indexer.wq_b", int64_t{c.index_n_heads} * c.index_head_dim, c.q_lora_rank,
        "index_n_heads * index_head_dim x q_lora_rank");
    bf16(prefix + "indexer.weights_proj.weight", {c.index_n_heads, c.hidden_size},
         "index_n_heads x hidden_size");
    compressor(prefix + "indexer.compressor.", kind, c.index_head_dim, "index_head_dim");
  }
  void ffn(const std::string& prefix, bool hash_routed) {
    const ModelConfig& c = config_;
    bf16(prefix + "gate.weight", {c.n_routed_experts, c.hidden_size},
         "n_routed_experts x hidden_size");
    if (hash_routed) {
      add(prefix + "gate.tid2eid", {c.vocab_size, c.num_experts_per_tok}, DType::kI64,
          "vocab_size x num_experts_per_tok");
    } else {
      f32(prefix + "gate.bias", {c.n_routed_experts}, "n_routed_experts");
    }
    const int64_t inner = c.moe_intermediate_size, hidden = c.hidden_size;
    const std::string up = "moe_intermediate_size x hidden_size";
    const std::string down = "hidden_size x moe_intermediate_size";
    for (int expert = 0; expert < c.n_routed_experts; ++expert) {
      const std::string stem = prefix + "experts." + std::to_string(expert) + ".";
      expert_matrix(stem + "w1", inner, hidden, up);
      expert_matrix(stem + "w2", hidden, inner, down);
      expert_matrix(stem + "w3", inner, hidden, up);
    }
    if (c.n_shared_experts == 0) return;
    fp8(prefix + "shared_experts.w1", inner, hidden, up);
    fp8(prefix + "shared_experts.w2", hidden, inner, down);
    fp8(prefix + "shared_experts.w3", inner, hidden, up);
  }
  void hyper_connection(const std::string& stem, int64_t rows, int64_t scales) {
    const int64_t width = config_.hc_mult * config_.hidden_size;
    const std::string rows_name = scales == 1 ? "hc_mult" : "(2 + hc_mult) * hc_mult";
    f32(stem + "_fn", {rows, width}, rows_name + " x hc_mult * hidden_size");
    f32(stem + "_base", {rows}, rows_name);
    f32(stem + "_scale", {scales}, "number of mixes");
  }
  void block(const std::string& prefix, const LayerKind& kind, bool hash_routed) {
    bf16(prefix + "attn_norm.weight", {config_.hidden_size}, "hidden_size");
    bf16(prefix + "ffn_norm.weight", {config_.hidden_size}, "hidden_size");
    hyper_connection(prefix + "hc_attn", config_.hc_mix_rows(), 3);
    hyper_connection(prefix + "hc_ffn", config_.hc_mix_rows(), 3);
    attention(prefix + "attn.", kind);
    ffn(prefix + "ffn.", hash_routed);
  }
  void whole_model() {
    const ModelConfig& c = config_;
    bf16("embed.weight", {c.vocab_size, c.hidden_size}, "vocab_size x hidden_size");
    bf16("head.weight", {c.vocab_size, c.hidden_size}, "vocab_size x hidden_size");
    bf16("norm.weight", {c.hidden_size}, "hidden_size");
    hyper_connection("hc_head", c.hc_mult, 1);
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
      block("layers." + std::to_string(layer) + ".", c.layer_kind(layer), c.is_hash_layer(layer));
    }
    for (int mtp = 0; mtp < c.num_nextn_predict_layers; ++mtp) {
      const std::string prefix = "mtp." + std::to_string(mtp) + ".";
      block(prefix, c.layer_kind(c.num_hidden_layers + mtp), false);
      fp8(prefix + "e_proj", c.hidden_size, c.hidden_size, "hidden_size x hidden_size");
      fp8(prefix + "h_proj", c.hidden_size, c.hidden_size, "hidden_size x hidden_size");
      for (const char* norm : {"enorm", "hnorm", "norm"}) {
        bf16(prefix + norm + ".weight", {c.hidden_size}, "hidden_size");
      }
      hyper_connection(prefix + "hc_head", c.hc_mult, 1);
    }
  }

 private:
  const ModelConfig& config_;
  std::vector<ExpectedTensor>& out_;
};

}  // namespace

std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config) {
  std::vector<ExpectedTensor> out;
  Table(config, out).whole_model();
  return out;
}

std::vector<ExpectedTensor> expected_attention_tensors(const ModelConfig& config,
                                                       const LayerKind& kind,
                                                       const std::string& prefix) {
  std::vector<ExpectedTensor> out;
  Table(config, out).attention(prefix, kind);
  return out;
}

}  // namespace dsv4
