// Checkpoint folders: what is accepted, under both naming styles.
#include <gtest/gtest.h>

#include "checkpoint/bind.h"
#include "checkpoint/names.h"
#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

const std::string kRoot = DSV4_SOURCE_DIR;

void expect_same_content(const TensorSource& source, const StoredTensors& tensors) {
  for (const auto& [name, tensor] : tensors) {
    ASSERT_TRUE(source.contains(name)) << name;
    const StoredTensor given = stored(source.get(name));
    EXPECT_EQ(given.dtype, tensor.dtype) << name;
    EXPECT_EQ(given.shape, tensor.shape) << name;
    EXPECT_EQ(given.bytes, tensor.bytes) << name;
  }
}

StoredTensor to_f32(const StoredTensor& bf16) {
  StoredTensor out{"F32", bf16.shape, ""};
  for (size_t i = 0; i < bf16.bytes.size(); i += 2) {
    out.bytes += std::string(2, '\0') + bf16.bytes.substr(i, 2);  // the upper half of a float
  }
  return out;
}
StoredTensor to_bf16(const StoredTensor& f32) {
  StoredTensor out{"BF16", f32.shape, ""};
  for (size_t i = 0; i < f32.bytes.size(); i += 4) out.bytes += f32.bytes.substr(i + 2, 2);
  return out;
}
TEST(OpenCheckpoint, SingleFile) {
  const TempDir dir;
  const StoredTensors tensors = small_checkpoint();
  const auto source = open_small(dir, tensors);
  expect_same_content(*source, tensors);
  EXPECT_EQ(source->origin("embed.weight"), dir.file("model.safetensors"));
  EXPECT_FALSE(source->contains("embed.bias"));
  expect_error(ErrorCode::kNotFound, {"'embed.bias'", dir.path()},
               [&] { source->get("embed.bias"); });
  expect_error(ErrorCode::kNotFound, {"'embed.bias'"}, [&] { source->origin("embed.bias"); });
}

TEST(OpenCheckpoint, ShardsWithIndex) {
  const TempDir dir;
  const StoredTensors tensors = small_checkpoint();
  write_sharded(dir.path(), tensors, 3);
  // The index decides; a file that it does not name is not read.
  write_file(dir.file("model.safetensors"), "garbage");
  expect_same_content(*open_checkpoint(dir.path(), small_config()), tensors);
}

TEST(OpenCheckpoint, TrainedModel) {
  const std::string folder = kRoot + "/models/tiny-shakespeare";
  const ModelConfig config = ModelConfig::load(folder);
  const auto source = open_checkpoint(folder, config);
  for (const ExpectedTensor& tensor : expected_tensors(config)) {
    EXPECT_EQ(source->get(tensor.name).dtype, tensor.dtype) << tensor.name;
    EXPECT_EQ(source->get(tensor.name).num_bytes(), tensor.num_bytes()) << tensor.name;
  }
  const ModelWeights weights = bind_model(*source, config);
  EXPECT_EQ(weights.layers.size(), 4u);
  EXPECT_EQ(weights.layers[2].ffn.experts.size(), 16u);
}

TEST(OpenCheckpoint, UnquantisedWeightsNeedNoScales) {
  const TempDir dir;
  const StoredTensors tensors = small_checkpoint(FormulaStorage::kBf16Values);
  ASSERT_EQ(tensors.count("layers.0.attn.wq_a.scale"), 0u);
  expect_same_content(*open_small(dir, tensors), tensors);
}

TEST(OpenCheckpoint, OtherStoragesOfTheSameValues) {
  const TempDir dir;
  const StoredTensors released = small_checkpoint();
  StoredTensors tensors = released;
  const auto change = [&](const char* name, auto f) { tensors.at(name) = f(tensors.at(name)); };
  change("layers.0.attn.attn_sink", to_bf16);  // a bf16 save of everything
  change("layers.1.attn.compressor.ape", to_bf16);
  change("layers.0.attn.wkv.scale", scales_to_f32);  // transformers keeps float scales
  change("layers.0.ffn.experts.1.w2.scale", scales_to_f32);
  change("layers.0.attn_norm.weight", to_f32);
  tensors.at("layers.0.attn.wq_a.scale").dtype = "U8";
  tensors.at("layers.0.ffn.experts.0.w1.weight").dtype = "U8";
  const StoredTensor ids = tensors.at("layers.0.ffn.gate.tid2eid");
  StoredTensor narrow{"I32", ids.shape, ""};
  for (size_t i = 0; i < ids.bytes.size(); i += 8) narrow.bytes += ids.bytes.substr(i, 4);
  tensors.at("layers.0.ffn.gate.tid2eid") = narrow;

  StoredTensors expected = released;
  expected.at("layers.0.attn_norm.weight") = tensors.at("layers.0.attn_norm.weight");
  expect_same_content(*open_small(dir, tensors), expected);
}

TEST(OpenCheckpoint, FloatScalesOverTheirWholeRange) {
  const TempDir dir;
  StoredTensors tensors = small_checkpoint();
  StoredTensor& scale = tensors.at("layers.0.ffn.experts.0.w1.scale");
  for (size_t i = 0; i < scale.bytes.size(); ++i) {
    scale.bytes[i] = static_cast<char>(i == 0 ? 0 : i == 1 ? 254 : 100 + i);
  }
  const StoredTensors expected = tensors;
  scale = scales_to_f32(scale);
  expect_same_content(*open_small(dir, tensors), expected);
}

TEST(OpenCheckpoint, SinksOfMinusInfinityAreValues) {
  const TempDir dir;
  StoredTensors tensors = small_checkpoint();
  tensors.at("layers.0.attn.attn_sink").bytes.replace(0, 4, std::string("\0\0\x80\xff", 4));
  expect_same_content(*open_small(dir, tensors), tensors);
}

// ---- transformers naming ----

TEST(HuggingFaceNames, TableOfTheSpecification) {
  const std::pair<const char*, const char*> kTable[] = {
      {"embed.weight", "model.embed_tokens.weight"},
      {"head.weight", "lm_head.weight"},
      {"norm.weight", "model.norm.weight"},
      {"hc_head_fn", "model.hc_head.hc_fn"},
      {"hc_head_scale", "model.hc_head.hc_scale"},
      {"layers.12.attn_norm.weight", "model.layers.12.input_layernorm.weight"},
      {"layers.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"},
      {"layers.0.hc_attn_base", "model.layers.0.attn_hc.base"},
      {"layers.0.hc_ffn_scale", "model.layers.0.ffn_hc.scale"},
      {"layers.0.attn.attn_sink", "model.layers.0.self_attn.sinks"},
      {"layers.0.attn.wq_a.weight", "model.layers.0.self_attn.q_a_proj.weight"},
      {"layers.0.attn.q_norm.weight", "model.layers.0.self_attn.q_a_norm.weight"},
      {"layers.0.attn.wq_b.weight", "model.layers.0.self_attn.q_b_proj.weight"},
      {"layers.0.attn.wkv.weight", "model.layers.0.self_attn.kv_proj.weight"},
      {"layers.0.attn.kv_norm.weight", "model.layers.0.self_attn.kv_norm.weight"},
      {"layers.0.attn.wo_a.weight", "model.layers.0.self_attn.o_a_proj.weight"},
      {"layers.0.attn.wo_b.weight", "model.layers.0.self_attn.o_b_proj.weight"},
      {"layers.0.attn.compressor.wkv.weight", "model.layers.0.self_attn.compressor.kv_proj.weight"},
      {"layers.0.attn.compressor.wgate.weight",
       "model.layers.0.self_attn.compressor.gate_proj.weight"},
      {"layers.0.attn.compressor.ape", "model.layers.0.self_attn.compressor.position_bias"},
      {"layers.0.attn.compressor.norm.weight",
       "model.layers.0.self_attn.compressor.kv_norm.weight"},
      {"layers.0.attn.indexer.wq_b.weight",
       "model.layers.0.self_attn.compressor.indexer.q_b_proj.weight"},
      {"layers.0.attn.indexer.weights_proj.weight",
       "model.layers.0.self_attn.compressor.indexer.weights_proj.weight"},
      {"layers.0.attn.indexer.compressor.wkv.weight",
       "model.layers.0.self_attn.compressor.indexer.kv_proj.weight"},
      {"layers.0.attn.indexer.compressor.wgate.weight",
       "model.layers.0.self_attn.compressor.indexer.gate_proj.weight"},
      {"layers.0.attn.indexer.compressor.ape",
       "model.layers.0.self_attn.compressor.indexer.position_bias"},
      {"layers.0.attn.indexer.compressor.norm.weight",
       "model.layers.0.self_attn.compressor.indexer.kv_norm.weight"},
      {"layers.0.ffn.gate.weight", "model.layers.0.mlp.gate.weight"},
      {"layers.0.ffn.gate.bias", "model.layers.0.mlp.gate.e_score_correction_bias"},
      {"layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid"},
      {"layers.0.ffn.shared_experts.w1.weight",
       "model.layers.0.mlp.shared_experts.gate_proj.weight"},
      {"layers.0.ffn.shared_experts.w3.weight", "model.layers.0.mlp.shared_experts.up_proj.weight"},
      {"layers.0.ffn.shared_experts.w2.weight",
       "model.layers.0.mlp.shared_experts.down_proj.weight"},
  };
  for (const auto& [released, name] : kTable) {
    EXPECT_EQ(hugging_face_names(released), std::vector<std::string>{name});
  }
  EXPECT_EQ(hugging_face_names("layers.0.attn.wq_a.scale"),
            (std::vector<std::string>{"model.layers.0.self_attn.q_a_proj.weight_scale_inv",
                                      "model.layers.0.self_attn.q_a_proj.weight_scale"}));
  for (const char* none : {"mtp.0.enorm.weight", "layers.0.ffn.experts.0.w1.weight", "layers.",
                           "layers.0", "something"}) {
    EXPECT_TRUE(hugging_face_names(none).empty()) << none;
  }
}

TEST(HuggingFaceNames, StackedExperts) {
  const auto gate_up = parse_stacked_experts("model.layers.17.mlp.experts.gate_up_proj");
  ASSERT_TRUE(gate_up.has_value());
  EXPECT_EQ(gate_up->layer, 17);
  EXPECT_TRUE(gate_up->gate_up);
  const auto down = parse_stacked_experts("model.layers.0.mlp.experts.down_proj");
  ASSERT_TRUE(down.has_value());
  EXPECT_FALSE(down->gate_up);
  for (const char* other :
       {"model.layers.-1.mlp.experts.down_proj", "model.layers.99999999999.mlp.experts.down_proj",
        "model.layers.x.mlp.experts.down_proj", "layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.down_proj.weight", "model.layers.0.mlp.experts.up_proj"}) {
    EXPECT_FALSE(parse_stacked_experts(other).has_value()) << other;
  }
}

bool is_routed_expert(const std::string& name) {
  return name.find(".ffn.experts.") != std::string::npos;
}

/// The small model as transformers saves it: other names, no MTP layer, stacked bf16 experts.
/// `scale_name` picks one of the two spellings of scales.
StoredTensors hugging_face_checkpoint(const StoredTensors& released, size_t scale_name) {
  StoredTensors out;
  for (const auto& [name, tensor] : released) {
    if (name.starts_with("mtp.") || is_routed_expert(name)) continue;
    const std::vector<std::string> names = hugging_face_names(name);
    out[names[std::min(scale_name, names.size() - 1)]] = tensor;
  }
  const StoredTensors values = small_checkpoint(FormulaStorage::kBf16Values);
  const ModelConfig config = small_config();
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const std::string index = std::to_string(layer);
    StoredTensor gate_up{"BF16", {config.n_routed_experts, 64, 64}, ""};
    StoredTensor down{"BF16", {config.n_routed_experts, 64, 32}, ""};
    for (int expert = 0; expert < config.n_routed_experts; ++expert) {
      const std::string stem = "layers." + index + ".ffn.experts." + std::to_string(expert) + ".";
      gate_up.bytes += values.at(stem + "w1.weight").bytes + values.at(stem + "w3.weight").bytes;
      down.bytes += values.at(stem + "w2.weight").bytes;
    }
    out["model.layers." + index + ".mlp.experts.gate_up_proj"] = gate_up;
    out["model.layers." + index + ".mlp.experts.down_proj"] = down;
  }
  return out;
}

TEST(OpenCheckpoint, TransformersNames) {
  const StoredTensors released = small_checkpoint();
  const StoredTensors values = small_checkpoint(FormulaStorage::kBf16Values);
  for (size_t scale_name : {size_t{0}, size_t{1}}) {
    const TempDir dir;
    const auto source = open_small(dir, hugging_face_checkpoint(released, scale_name));
    StoredTensors expected;
    for (const auto& [name, tensor] : released) {
      if (name.starts_with("mtp.") || is_routed_expert(name)) continue;
      expected[name] = tensor;
    }
    for (const auto& [name, tensor] : values) {
      if (is_routed_expert(name) && !name.starts_with("mtp.")) expected[name] = tensor;
    }
    expect_same_content(*source, expected);
    EXPECT_FALSE(source->contains("mtp.0.norm.weight"));
    EXPECT_FALSE(source->contains("layers.0.ffn.experts.0.w1.scale"));
    EXPECT_EQ(source->origin("layers.1.ffn.experts.2.w3.weight"),
              dir.file("model.safetensors") + " (as 'model.layers.1.mlp.experts.gate_up_proj')");
    const ModelWeights weights = bind_model(*source, small_config());
    EXPECT_TRUE(weights.mtp.empty());
    EXPECT_EQ(weights.layers[0].attn.wq_a.dtype, DType::kF8E4M3);
    EXPECT_NE(weights.layers[0].attn.wq_a.scale, nullptr);
    EXPECT_EQ(weights.layers[0].ffn.experts[0].w1.dtype, DType::kBf16);
    EXPECT_EQ(weights.layers[0].ffn.experts[0].w1.scale, nullptr);
  }
}

TEST(OpenCheckpoint, TransformersNamesUnquantised) {
  const TempDir dir;
  const StoredTensors values = small_checkpoint(FormulaStorage::kBf16Values);
  const auto source = open_small(dir, hugging_face_checkpoint(values, 0));
  StoredTensors expected;
  for (const auto& [name, tensor] : values) {
    if (!name.starts_with("mtp.")) expected[name] = tensor;
  }
  expect_same_content(*source, expected);
}

}  // namespace
}  // namespace dsv4::testing
