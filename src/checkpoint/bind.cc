#include "checkpoint/bind.h"

#include <algorithm>

#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

class Binder {
 public:
  Binder(const TensorSource& source, const ModelConfig& config)
      : source_(source), config_(config) {}

  /// Float vector or matrix used as it is: f32, or bf16 where the operation takes both.
  ConstTensor values(const std::string& name, std::initializer_list<int64_t> shape,
                     std::initializer_list<DType> dtypes) const {
    const ConstTensor tensor = source_.get(name);
    const ConstTensor expected(nullptr, *dtypes.begin(), shape);
    if (!same_shape(tensor, expected) ||
        std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
      refuse(name, describe(expected), tensor);
    }
    return tensor;
  }
  ConstTensor norm(const std::string& name, int64_t size) const {
    return values(name, {size}, {DType::kBf16, DType::kF32});
  }
  ConstTensor f32(const std::string& name, std::initializer_list<int64_t> shape) const {
    return values(name, shape, {DType::kF32});
  }

  /// stem.weight [rows, cols] in any storage, with stem.scale where the storage has scales.
  Weight matrix(const std::string& stem, int64_t rows, int64_t cols) const {
    const std::string name = stem + ".weight";
    const ConstTensor tensor = source_.get(name);
    Weight out;
    out.dtype = tensor.dtype;
    out.data = tensor.data;
    out.rows = rows;
    out.cols = cols;
    out.row_stride = cols;
    out.block_rows = config_.weight_block_rows;
    out.block_cols = config_.weight_block_cols;
    switch (tensor.dtype) {
      case DType::kF32:
      case DType::kBf16:
        check_shape(name, tensor, rows, cols);
        return out;
      case DType::kF8E4M3:
        check_shape(name, tensor, rows, cols);
        attach_scale(out, stem, ceil_div(rows, out.block_rows), ceil_div(cols, out.block_cols));
        return out;
      case DType::kF4E2M1:
        check_shape(name, tensor, rows, cols / 2);
        attach_scale(out, stem, rows, cols / 32);
        return out;
      default:
        refuse(name, concat("[", rows, ", ", cols, "] f32, bf16, f8_e4m3 or f4_e2m1"), tensor);
    }
  }

  CompressorWeights compressor(const std::string& prefix, const LayerKind& kind,
                               int64_t width) const {
    const int64_t rows = kind.pooled_windows() * width;
    CompressorWeights out;
    out.wkv = matrix(prefix + "wkv", rows, config_.hidden_size);
    out.wgate = matrix(prefix + "wgate", rows, config_.hidden_size);
    out.ape = f32(prefix + "ape", {kind.compress_ratio, rows});
    out.norm = norm(prefix + "norm.weight", width);
    return out;
  }

  AttentionWeights attention(const std::string& prefix, const LayerKind& kind) const {
    const ModelConfig& c = config_;
    const int64_t o_rows = c.o_groups * c.o_lora_rank;
    AttentionWeights out;
    out.wq_a = matrix(prefix + "wq_a", c.q_lora_rank, c.hidden_size);
    out.q_norm = norm(prefix + "q_norm.weight", c.q_lora_rank);
    out.wq_b = matrix(prefix + "wq_b", int64_t{c.num_heads} * c.head_dim, c.q_lora_rank);
    out.wkv = matrix(prefix + "wkv", c.head_dim, c.hidden_size);
    out.kv_norm = norm(prefix + "kv_norm.weight", c.head_dim);
    out.attn_sink = f32(prefix + "attn_sink", {c.num_heads});
    out.wo_a = matrix(prefix + "wo_a", o_rows, c.group_width());
    out.wo_b = matrix(prefix + "wo_b", c.hidden_size, o_rows);
    // A group is a row slice of wo_a, and a slice begins where a scale block begins.
    if (out.wo_a.scale != nullptr && c.o_groups > 1 && c.o_lora_rank % out.wo_a.block_rows != 0) {
      fail(ErrorCode::kUnsupported, prefix,
           "wo_a.weight: expected o_lora_rank to be a multiple of ", "the scale block's ",
           out.wo_a.block_rows, " rows when there are ", c.o_groups, " output groups, given ",
           c.o_lora_rank, ", in ", source_.origin(prefix + "wo_a.weight"));
    }
    if (kind.compress_ratio == 0) return out;
    out.compressor = compressor(prefix + "compressor.", kind, c.head_dim);
    if (!kind.indexer) return out;
    const std::string indexer = prefix + "indexer.";
    out.indexer.emplace();
    out.indexer->wq_b =
        matrix(indexer + "wq_b", int64_t{c.index_n_heads} * c.index_head_dim, c.q_lora_rank);
    out.indexer->weights_proj = matrix(indexer + "weights_proj", c.index_n_heads, c.hidden_size);
    out.indexer->compressor = compressor(indexer + "compressor.", kind, c.index_head_dim);
    return out;
  }

  ExpertWeights expert(const std::string& prefix) const {
    const int64_t inner = config_.moe_intermediate_size, hidden = config_.hidden_size;
    return {.w1 = matrix(prefix + "w1", inner, hidden),
            .w3 = matrix(prefix + "w3", inner, hidden),
            .w2 = matrix(prefix + "w2", hidden, inner)};
  }

  FfnWeights ffn(const std::string& prefix, bool hash_routed) const {
    const ModelConfig& c = config_;
    FfnWeights out;
    out.gate = matrix(prefix + "gate", c.n_routed_experts, c.hidden_size);
    if (hash_routed) {
      out.tid2eid =
          values(prefix + "gate.tid2eid", {c.vocab_size, c.num_experts_per_tok}, {DType::kI64});
    } else {
      out.bias = f32(prefix + "gate.bias", {c.n_routed_experts});
    }
    out.experts.reserve(static_cast<size_t>(c.n_routed_experts));
    for (int i = 0; i < c.n_routed_experts; ++i) {
      out.experts.push_back(expert(concat(prefix, "experts.", i, ".")));
    }
    if (c.n_shared_experts > 0) out.shared = expert(prefix + "shared_experts.");
    return out;
  }

  HcWeights hyper_connection(const std::string& stem, int64_t rows, int64_t scales) const {
    return {.fn = f32(stem + "_fn", {rows, config_.hc_mult * config_.hidden_size}),
            .base = f32(stem + "_base", {rows}),
            .scale = f32(stem + "_scale", {scales})};
  }

  BlockWeights block(const std::string& prefix, const LayerKind& kind, bool hash_routed) const {
    BlockWeights out;
    out.attn_norm = norm(prefix + "attn_norm.weight", config_.hidden_size);
    out.ffn_norm = norm(prefix + "ffn_norm.weight", config_.hidden_size);
    out.hc_attn = hyper_connection(prefix + "hc_attn", config_.hc_mix_rows(), 3);
    out.hc_ffn = hyper_connection(prefix + "hc_ffn", config_.hc_mix_rows(), 3);
    out.attn = attention(prefix + "attn.", kind);
    out.ffn = ffn(prefix + "ffn.", hash_routed);
    return out;
  }

  MtpWeights mtp(int mtp_idx) const {
    const int64_t hidden = config_.hidden_size;
    const std::string prefix = concat("mtp.", mtp_idx, ".");
    MtpWeights out;
    out.block = block(prefix, config_.layer_kind(config_.num_hidden_layers + mtp_idx), false);
    out.e_proj = matrix(prefix + "e_proj", hidden, hidden);
    out.h_proj = matrix(prefix + "h_proj", hidden, hidden);
    out.enorm = norm(prefix + "enorm.weight", hidden);
    out.hnorm = norm(prefix + "hnorm.weight", hidden);
    out.norm = norm(prefix + "norm.weight", hidden);
    out.hc_head = hyper_connection(prefix + "hc_head", config_.hc_mult, 1);
    return out;
  }

 private:
  static bool same_shape(const ConstTensor& a, const ConstTensor& b) {
    return a.rank == b.rank &&
           std::equal(a.shape.begin(), a.shape.begin() + a.rank, b.shape.begin()) &&
           a.is_contiguous();
  }
  [[noreturn]] void refuse(const std::string& name, const std::string& expected,
                           const ConstTensor& given) const {
    fail(ErrorCode::kInvalidArgument, name, ": expected ", expected, ", given ", describe(given),
         ", in ", source_.origin(name));
  }
  void check_shape(const std::string& name, const ConstTensor& tensor, int64_t rows,
                   int64_t cols) const {
    const ConstTensor expected(nullptr, tensor.dtype, {rows, cols});
    if (!same_shape(tensor, expected)) refuse(name, describe(expected), tensor);
  }
  void attach_scale(Weight& weight, const std::string& stem, int64_t rows, int64_t cols) const {
    const ConstTensor scale = values(stem + ".scale", {rows, cols}, {DType::kF8E8M0});
    weight.scale = scale.as<uint8_t>();
    weight.scale_stride = cols;
  }

  const TensorSource& source_;
  const ModelConfig& config_;
};

}  // namespace

AttentionWeights bind_attention(const TensorSource& source, const ModelConfig& config,
                                const LayerKind& kind, const std::string& prefix) {
  return Binder(source, config).attention(prefix, kind);
}

ModelWeights bind_model(const TensorSource& source, const ModelConfig& config) {
  const Binder binder(source, config);
  ModelWeights out;
  out.embed = binder.values("embed.weight", {config.vocab_size, config.hidden_size},
                            {DType::kBf16, DType::kF32});
  out.head = binder.matrix("head", config.vocab_size, config.hidden_size);
  out.norm = binder.norm("norm.weight", config.hidden_size);
  out.hc_head = binder.hyper_connection("hc_head", config.hc_mult, 1);
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    out.layers.push_back(binder.block(concat("layers.", layer, "."), config.layer_kind(layer),
                                      config.is_hash_layer(layer)));
  }
  for (int mtp = 0; mtp < config.num_nextn_predict_layers; ++mtp) {
    if (!source.contains(concat("mtp.", mtp, ".norm.weight"))) break;
    out.mtp.push_back(binder.mtp(mtp));
  }
  return out;
}

}  // namespace dsv4
