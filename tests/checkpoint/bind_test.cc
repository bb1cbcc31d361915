// Weights by role: the views that the code computes with point at the right bytes.
#include "checkpoint/bind.h"

#include <gtest/gtest.h>

#include <map>

#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

/// Tensors in memory, as an embedding program might bring them.
class MapSource final : public TensorSource {
 public:
  explicit MapSource(StoredTensors tensors) : tensors_(std::move(tensors)) {}
  bool contains(std::string_view name) const override {
    return tensors_.count(std::string(name)) > 0;
  }
  ConstTensor get(std::string_view name) const override {
    const auto it = tensors_.find(std::string(name));
    if (it == tensors_.end()) throw Error(ErrorCode::kNotFound, std::string(name));
    const std::map<std::string, DType> kTypes = {
        {"F32", DType::kF32},        {"BF16", DType::kBf16}, {"F8_E4M3", DType::kF8E4M3},
        {"F8_E8M0", DType::kF8E8M0}, {"I8", DType::kF4E2M1}, {"I64", DType::kI64},
        {"I32", DType::kI32},        {"U8", DType::kU8}};
    ConstTensor view;
    view.data = it->second.bytes.data();
    view.dtype = kTypes.at(it->second.dtype);
    view.rank = static_cast<int>(it->second.shape.size());
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = it->second.shape[static_cast<size_t>(i)];
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
    return view;
  }
  std::string origin(std::string_view) const override { return "memory"; }

  StoredTensors tensors_;
};

void expect_matrix(const TensorSource& source, const std::string& stem, const Weight& weight,
                   int64_t rows, int64_t cols) {
  const ConstTensor tensor = source.get(stem + ".weight");
  EXPECT_EQ(weight.data, tensor.data) << stem;
  EXPECT_EQ(weight.dtype, tensor.dtype) << stem;
  EXPECT_EQ(weight.rows, rows) << stem;
  EXPECT_EQ(weight.cols, cols) << stem;
  EXPECT_EQ(weight.row_stride, cols) << stem;
  EXPECT_EQ(weight.num_bytes(), tensor.num_bytes()) << stem;
  if (!source.contains(stem + ".scale")) {
    EXPECT_EQ(weight.scale, nullptr) << stem;
    return;
  }
  const ConstTensor scale = source.get(stem + ".scale");
  EXPECT_EQ(weight.scale, scale.data) << stem;
  EXPECT_EQ(weight.scale_stride, scale.shape[1]) << stem;
}

TEST(Bind, EveryRoleGetsItsTensor) {
  const ModelConfig config = small_config();
  for (FormulaStorage storage : {FormulaStorage::kReleased, FormulaStorage::kBf16Values}) {
    const auto source = formula_source(expected_tensors(config), 1, storage);
    const ModelWeights model = bind_model(*source, config);
    EXPECT_EQ(model.embed.data, source->get("embed.weight").data);
    expect_matrix(*source, "head", model.head, 24, 64);
    EXPECT_EQ(model.norm.data, source->get("norm.weight").data);
    EXPECT_EQ(model.hc_head.fn.data, source->get("hc_head_fn").data);
    EXPECT_EQ(model.hc_head.base.data, source->get("hc_head_base").data);
    EXPECT_EQ(model.hc_head.scale.data, source->get("hc_head_scale").data);
    ASSERT_EQ(model.layers.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      const BlockWeights& block = model.layers[i];
      const std::string prefix = "layers." + std::to_string(i) + ".";
      EXPECT_EQ(block.attn_norm.data, source->get(prefix + "attn_norm.weight").data);
      EXPECT_EQ(block.ffn_norm.data, source->get(prefix + "ffn_norm.weight").data);
      EXPECT_EQ(block.hc_attn.fn.data, source->get(prefix + "hc_attn_fn").data);
      EXPECT_EQ(block.hc_ffn.base.data, source->get(prefix + "hc_ffn_base").data);
      EXPECT_EQ(block.hc_ffn.scale.data, source->get(prefix + "hc_ffn_scale").data);
      const AttentionWeights& attn = block.attn;
      EXPECT_EQ(attn.attn_sink.data, source->get(prefix + "attn.attn_sink").data);
      EXPECT_EQ(attn.q_norm.data, source->get(prefix + "attn.q_norm.weight").data);
      EXPECT_EQ(attn.kv_norm.data, source->get(prefix + "attn.kv_norm.weight").data);
      expect_matrix(*source, prefix + "attn.wq_a", attn.wq_a, 48, 64);
      expect_matrix(*source, prefix + "attn.wq_b", attn.wq_b, 256, 48);
      expect_matrix(*source, prefix + "attn.wkv", attn.wkv, 64, 64);
      expect_matrix(*source, prefix + "attn.wo_a", attn.wo_a, 256, 128);
      expect_matrix(*source, prefix + "attn.wo_b", attn.wo_b, 64, 256);
      ASSERT_EQ(attn.compressor.has_value(), i > 0);
      ASSERT_EQ(attn.indexer.has_value(), i == 1);
      if (attn.compressor) {
        const int64_t rows = i == 1 ? 128 : 64;
        expect_matrix(*source, prefix + "attn.compressor.wkv", attn.compressor->wkv, rows, 64);
        expect_matrix(*source, prefix + "attn.compressor.wgate", attn.compressor->wgate, rows, 64);
        EXPECT_EQ(attn.compressor->ape.data, source->get(prefix + "attn.compressor.ape").data);
        EXPECT_EQ(attn.compressor->norm.data,
                  source->get(prefix + "attn.compressor.norm.weight").data);
      }
      if (attn.indexer) {
        const std::string indexer = prefix + "attn.indexer.";
        expect_matrix(*source, indexer + "wq_b", attn.indexer->wq_b, 64, 48);
        expect_matrix(*source, indexer + "weights_proj", attn.indexer->weights_proj, 2, 64);
        expect_matrix(*source, indexer + "compressor.wkv", attn.indexer->compressor.wkv, 64, 64);
        EXPECT_EQ(attn.indexer->compressor.ape.data, source->get(indexer + "compressor.ape").data);
      }
      expect_matrix(*source, prefix + "ffn.gate", block.ffn.gate, 3, 64);
      EXPECT_EQ(static_cast<bool>(block.ffn.tid2eid), i == 0);
      EXPECT_EQ(static_cast<bool>(block.ffn.bias), i != 0);
      ASSERT_EQ(block.ffn.experts.size(), 3u);
      for (size_t e = 0; e < 3; ++e) {
        const std::string stem = prefix + "ffn.experts." + std::to_string(e) + ".";
        expect_matrix(*source, stem + "w1", block.ffn.experts[e].w1, 32, 64);
        expect_matrix(*source, stem + "w3", block.ffn.experts[e].w3, 32, 64);
        expect_matrix(*source, stem + "w2", block.ffn.experts[e].w2, 64, 32);
      }
      expect_matrix(*source, prefix + "ffn.shared_experts.w2", block.ffn.shared.w2, 64, 32);
    }
    ASSERT_EQ(model.mtp.size(), 1u);
    expect_matrix(*source, "mtp.0.e_proj", model.mtp[0].e_proj, 64, 64);
    EXPECT_EQ(model.mtp[0].enorm.data, source->get("mtp.0.enorm.weight").data);
    EXPECT_FALSE(model.mtp[0].block.attn.compressor.has_value());
    EXPECT_TRUE(static_cast<bool>(model.mtp[0].block.ffn.bias));
  }
}

TEST(Bind, NoSharedExpert) {
  nlohmann::json document = small_config_json();
  document["n_shared_experts"] = 0;
  const ModelConfig config = ModelConfig::parse(document.dump(), "c");
  const auto source = formula_source(expected_tensors(config), 1, FormulaStorage::kReleased);
  EXPECT_FALSE(source->contains("layers.0.ffn.shared_experts.w1.weight"));
  EXPECT_FALSE(static_cast<bool>(bind_model(*source, config).layers[0].ffn.shared.w1));
}

TEST(Bind, SourcesThatDoNotFitAreRefused) {
  const ModelConfig config = small_config();
  const auto refuse = [&](const char* name, const std::function<void(StoredTensor&)>& change,
                          const std::vector<std::string>& parts) {
    MapSource source(small_checkpoint());
    change(source.tensors_.at(name));
    std::vector<std::string> all = parts;
    all.push_back(name);
    all.push_back("memory");
    expect_error(ErrorCode::kInvalidArgument, all, [&] { bind_model(source, config); });
  };
  EXPECT_EQ(bind_model(MapSource(small_checkpoint()), config).layers.size(), 3u);
  refuse("layers.1.attn.wq_b.weight",
         [](StoredTensor& t) {
           t.shape = {48, 256};
         },
         {"[256, 48]", "given [48, 256]"});
  refuse("layers.1.attn.wq_b.scale",
         [](StoredTensor& t) {
           t.shape = {1, 2};
         },
         {"[2, 1]", "given [1, 2]"});
  refuse("layers.1.attn.wq_b.weight", [](StoredTensor& t) { t.dtype = "U8"; }, {"given", "u8"});
  refuse("layers.1.attn.attn_sink",
         [](StoredTensor& t) {
           t = {"BF16", {4}, "12345678"};
         },
         {"[4] f32", "given [4] bf16"});
  refuse("layers.0.ffn.gate.tid2eid", [](StoredTensor& t) { t.shape = {2, 24}; }, {"[24, 2] i64"});
  refuse("layers.0.ffn.experts.1.w1.weight",
         [](StoredTensor& t) {
           t.shape = {16, 64};
         },
         {"[32, 32]", "given [16, 64]"});
  refuse("layers.0.hc_attn_fn", [](StoredTensor& t) { t.shape = {128, 8}; }, {"[8, 128]"});
}

TEST(Bind, ScaleBlocksMustNotStraddleGroups) {
  // Accepted while the weights are bf16; with FP8 weights a group would begin inside a block.
  nlohmann::json document = small_config_json();
  document.erase("quantization_config");
  document["o_lora_rank"] = 24;
  const ModelConfig config = ModelConfig::parse(document.dump(), "c");
  const LayerKind kind = config.layer_kind(0);
  const auto tensors = expected_attention_tensors(config, kind, "a.");
  const auto plain = formula_source(tensors, 1, FormulaStorage::kBf16Values);
  EXPECT_EQ(bind_attention(*plain, config, kind, "a.").wo_a.rows, 48);
  const auto released = formula_source(tensors, 1, FormulaStorage::kReleased);
  expect_error(ErrorCode::kUnsupported, {"a.wo_a.weight", "o_lora_rank", "given 24"},
               [&] { bind_attention(*released, config, kind, "a."); });
}

}  // namespace
}  // namespace dsv4::testing
