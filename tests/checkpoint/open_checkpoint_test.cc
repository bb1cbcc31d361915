// Checkpoint folders: what is accepted, under both naming styles, and what is refused by name.
#include <gtest/gtest.h>

#include <cmath>

#include "checkpoint/bind.h"
#include "checkpoint/names.h"
#include "core/numbers.h"
#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

const std::string kRoot = DSV4_SOURCE_DIR;

/// Opens `tensors` as a single file.
std::unique_ptr<TensorSource> open_small(const TempDir& dir, const StoredTensors& tensors) {
  write_tensors(dir.file("model.safetensors"), tensors);
  return open_checkpoint(dir.path(), small_config());
}

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
StoredTensor scales_to_f32(const StoredTensor& e8m0) {
  StoredTensor out{"F32", e8m0.shape, ""};
  for (char byte : e8m0.bytes) {
    const float value = e8m0_to_f32(static_cast<uint8_t>(byte));
    out.bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
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

// ---- transformers naming
// -------------------------------------------------------------------------

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

// ---- what is refused
// -----------------------------------------------------------------------------

struct BadCheckpoint {
  const char* name;
  std::function<void(StoredTensors&)> change;
  ErrorCode code;
  std::vector<std::string> message;
};
class BadCheckpointTest : public ::testing::TestWithParam<BadCheckpoint> {};

TEST_P(BadCheckpointTest, IsRefusedByName) {
  const TempDir dir;
  StoredTensors tensors = small_checkpoint();
  GetParam().change(tensors);
  std::vector<std::string> parts = GetParam().message;
  parts.push_back(dir.path());
  expect_error(GetParam().code, parts, [&] { open_small(dir, tensors); });
}

using Change = std::function<void(StoredTensors&)>;
Change erase(const char* name) {
  return [=](StoredTensors& t) { ASSERT_EQ(t.erase(name), 1u); };
}
Change set_byte(const char* name, size_t index, int value) {
  return [=](StoredTensors& t) { t.at(name).bytes.at(index) = static_cast<char>(value); };
}
Change set_bytes(const char* name, size_t index, const std::string& bytes) {
  return [=](StoredTensors& t) { t.at(name).bytes.replace(index, bytes.size(), bytes); };
}
Change set_shape(const char* name, const std::vector<int64_t>& shape) {
  return [=](StoredTensors& t) { t.at(name).shape = shape; };
}
Change set_dtype(const char* name, const char* dtype) {
  return [=](StoredTensors& t) { t.at(name).dtype = dtype; };
}
Change replace(const char* name, const StoredTensor& tensor) {
  return [=](StoredTensors& t) { t.at(name) = tensor; };
}
Change float_scale(const char* name, float value) {
  return [=](StoredTensors& t) {
    StoredTensor& tensor = t.at(name);
    tensor = scales_to_f32(tensor);
    std::memcpy(tensor.bytes.data() + 4 * (tensor.bytes.size() / 4 - 1), &value, 4);
  };
}

constexpr ErrorCode kCorrupt = ErrorCode::kDataCorrupt;
constexpr ErrorCode kMissing = ErrorCode::kNotFound;
const char kWqA[] = "layers.0.attn.wq_a.weight";
const char kWqAScale[] = "layers.0.attn.wq_a.scale";
const char kExpertScale[] = "layers.2.ffn.experts.1.w3.scale";

const std::vector<BadCheckpoint> kBadCheckpoints = {
    {"MissingWeight", erase(kWqA), kMissing, {kWqA, "missing", "[48, 64] f8_e4m3", "q_lora_rank"}},
    {"MissingScale", erase(kWqAScale), kMissing, {kWqAScale, "missing", "[1, 1] f8_e8m0"}},
    {"MissingExpert",
     erase("layers.2.ffn.experts.2.w2.weight"),
     kMissing,
     {"layers.2.ffn.experts.2.w2.weight", "missing"}},
    {"MissingMtp", erase("mtp.0.h_proj.weight"), kMissing, {"mtp.0.h_proj.weight", "missing"}},
    {"MissingHashTable",
     erase("layers.0.ffn.gate.tid2eid"),
     kMissing,
     {"layers.0.ffn.gate.tid2eid", "vocab_size x num_experts_per_tok"}},
    {"UnknownTensor",
     [](StoredTensors& t) {
       t["layers.0.attn.wq_c.weight"] = {"U8", {1}, "x"};
     },
     kCorrupt,
     {"layers.0.attn.wq_c.weight", "no such tensor"}},
    {"LayerBeyondTheLast",
     [](StoredTensors& t) { t["layers.3.attn_norm.weight"] = t["layers.2.attn_norm.weight"]; },
     kCorrupt,
     {"layers.3.attn_norm.weight"}},
    {"BiasOnHashLayer",
     [](StoredTensors& t) { t["layers.0.ffn.gate.bias"] = t["layers.1.ffn.gate.bias"]; },
     kCorrupt,
     {"layers.0.ffn.gate.bias"}},
    {"NameOfControlCharacters",
     [](StoredTensors& t) {
       t["evil\n\x01name"] = {"U8", {1}, "x"};
     },
     kCorrupt,
     {"evil??name"}},
    {"WrongShape",
     set_shape(kWqA, {64, 48}),
     kCorrupt,
     {kWqA, "expected [48, 64]", "given [64, 48] f8_e4m3", "q_lora_rank x hidden_size"}},
    {"WrongRank", set_shape(kWqA, {3072}), kCorrupt, {kWqA, "given [3072]"}},
    {"WrongScaleShape",
     replace(kWqAScale, {"F8_E8M0", {1, 2}, "\x7f\x7f"}),
     kCorrupt,
     {kWqAScale, "expected [1, 1]", "128 x 128 blocks", "given [1, 2]"}},
    {"ShortNorm",
     replace("norm.weight", {"BF16", {63}, std::string(126, '\0')}),
     kCorrupt,
     {"norm.weight", "expected [64] bf16 (hidden_size)", "given [63]"}},
    {"WeightIsScaleType", set_dtype(kWqA, "F8_E8M0"), kCorrupt, {kWqA, "given [48, 64] f8_e8m0"}},
    {"ScaleIsWeightType", set_dtype(kWqAScale, "F8_E4M3"), kCorrupt, {kWqAScale, "f8_e4m3"}},
    {"Fp8WhereFp4IsExpected",
     set_dtype("layers.0.ffn.experts.0.w1.weight", "F8_E4M3"),
     kCorrupt,
     {"layers.0.ffn.experts.0.w1.weight", "f4_e2m1", "given [32, 32] f8_e4m3"}},
    {"Fp4WhereFp8IsExpected", set_dtype(kWqA, "I8"), kCorrupt, {kWqA, "given [48, 64] u8"}},
    {"IntegersForNorm",
     replace("norm.weight", {"I32", {64}, std::string(256, '\0')}),
     kCorrupt,
     {"norm.weight", "given [64] i32"}},
    {"FloatsForIds",
     replace("layers.0.ffn.gate.tid2eid", {"F32", {24, 2}, std::string(192, '\0')}),
     kCorrupt,
     {"tid2eid", "expected [24, 2] i64", "f32"}},
    {"HalfPrecision",
     set_dtype("norm.weight", "F16"),
     ErrorCode::kUnsupported,
     {"norm.weight", "given F16"}},
    {"UnknownDtype",
     set_dtype("norm.weight", "POSIT8"),
     ErrorCode::kUnsupported,
     {"norm.weight", "POSIT8"}},
    {"ScaleBesideBf16",
     replace(kWqA, {"BF16", {48, 64}, std::string(6144, '\0')}),
     kCorrupt,
     {kWqAScale, "expected none", "not quantised"}},
    {"NanScale", set_byte(kWqAScale, 0, 255), kCorrupt, {kWqAScale, "given 255 at [0, 0]"}},
    {"NanExpertScale",
     set_byte(kExpertScale, 5, 255),
     kCorrupt,
     {kExpertScale, "given 255 at [2, 1]"}},
    {"NanWeight", set_byte(kWqA, 65, 0x7f), kCorrupt, {kWqA, "given NaN at [1, 1]"}},
    {"NegativeNanWeight", set_byte(kWqA, 3071, 0xff), kCorrupt, {kWqA, "NaN at [47, 63]"}},
    {"NanNorm", set_bytes("norm.weight", 6, "\xc0\x7f"), kCorrupt, {"norm.weight", "NaN at [3]"}},
    {"NanSink",
     set_bytes("layers.0.attn.attn_sink", 4, "\x01\x02\xc0\x7f"),
     kCorrupt,
     {"attn_sink", "NaN at [1]"}},
    {"ExpertIdTooLarge",
     set_byte("layers.0.ffn.gate.tid2eid", 24, 3),
     kCorrupt,
     {"tid2eid", "from 0 to 2", "given 3 at [1, 1]"}},
    {"ExpertIdNegative",
     set_bytes("layers.0.ffn.gate.tid2eid", 0, std::string(8, '\xff')),
     kCorrupt,
     {"tid2eid", "given -1 at [0, 0]"}},
    {"FloatScaleOfThree",
     float_scale(kWqAScale, 3.0f),
     ErrorCode::kUnsupported,
     {kWqAScale, "powers of two", "given 3 at [0, 0]"}},
    {"FloatScaleOfZero", float_scale(kExpertScale, 0.0f), ErrorCode::kUnsupported, {kExpertScale}},
    {"FloatScaleNegative",
     float_scale(kExpertScale, -2.0f),
     ErrorCode::kUnsupported,
     {kExpertScale, "given -2 at [31, 1]"}},
    {"FloatScaleNan", float_scale(kExpertScale, NAN), ErrorCode::kUnsupported, {kExpertScale}},
    {"FloatScaleInfinite",
     float_scale(kExpertScale, INFINITY),
     ErrorCode::kUnsupported,
     {kExpertScale, "inf"}},
    {"FloatScaleTooSmall",
     float_scale(kExpertScale, 0x1p-128f),
     ErrorCode::kUnsupported,
     {kExpertScale}},
    {"BothNames",
     [](StoredTensors& t) { t["model.norm.weight"] = t["norm.weight"]; },
     kCorrupt,
     {"'norm.weight'", "once", "model.norm.weight"}},
    {"StackedBesideSingle",
     [](StoredTensors& t) {
       t["model.layers.0.mlp.experts.down_proj"] = {"BF16", {3, 64, 32}, std::string(12288, '\0')};
     },
     kCorrupt,
     {"layers.0.ffn.experts.0.w2.weight", "once"}},
    {"StackedOfWrongShape",
     [](StoredTensors& t) {
       t["model.layers.0.mlp.experts.down_proj"] = {"BF16", {3, 32, 64}, std::string(12288, '\0')};
     },
     kCorrupt,
     {"down_proj", "expected [3, 64, 32]", "given [3, 32, 64] bf16"}},
    {"StackedBeyondTheLastLayer",
     [](StoredTensors& t) {
       t["model.layers.3.mlp.experts.down_proj"] = {"BF16", {3, 64, 32}, std::string(12288, '\0')};
     },
     kCorrupt,
     {"model.layers.3.mlp.experts.down_proj", "layers 0 to 2"}},
    {"StackedQuantised",
     [](StoredTensors& t) {
       t["model.layers.0.mlp.experts.down_proj"] = {"F8_E4M3", {3, 64, 32}, std::string(6144, '1')};
     },
     kCorrupt,
     {"down_proj", "f8_e4m3"}},
};
INSTANTIATE_TEST_SUITE_P(Table, BadCheckpointTest, ::testing::ValuesIn(kBadCheckpoints),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(OpenCheckpoint, LongListsOfProblemsAreCounted) {
  const TempDir dir;
  StoredTensors tensors = small_checkpoint();
  size_t erased = 0;
  for (auto it = tensors.begin(); it != tensors.end();) {
    const bool layer1 = it->first.starts_with("layers.1.");
    erased += layer1 ? 1 : 0;
    it = layer1 ? tensors.erase(it) : std::next(it);
  }
  expect_error(kMissing,
               {"layers.1.attn_norm.weight", "and " + std::to_string(erased - 8) + " more"},
               [&] { open_small(dir, tensors); });
}

TEST(OpenCheckpoint, WorseProblemsDecideTheCode) {
  const TempDir dir;
  StoredTensors tensors = small_checkpoint();
  tensors.erase("norm.weight");
  tensors.at(kWqA).shape = {64, 48};
  expect_error(kCorrupt, {"norm.weight", "missing", kWqA}, [&] { open_small(dir, tensors); });
}

struct BadIndex {
  const char* name;
  std::function<void(const TempDir&)> change;
  ErrorCode code;
  std::vector<std::string> message;
};
class BadIndexTest : public ::testing::TestWithParam<BadIndex> {};

TEST_P(BadIndexTest, IsRefusedByName) {
  const TempDir dir;
  write_sharded(dir.path(), small_checkpoint(), 2);
  GetParam().change(dir);
  expect_error(GetParam().code, GetParam().message,
               [&] { open_checkpoint(dir.path(), small_config()); });
}

const char kIndex[] = "model.safetensors.index.json";
std::function<void(const TempDir&)> index_text(const std::string& text) {
  return [=](const TempDir& dir) { write_file(dir.file(kIndex), text); };
}
std::function<void(const TempDir&)> index_entry(const std::string& tensor,
                                                const nlohmann::json& value) {
  return [=](const TempDir& dir) {
    auto index = nlohmann::json::parse(read_file(dir.file(kIndex)));
    index["weight_map"][tensor] = value;
    write_file(dir.file(kIndex), index.dump());
  };
}

const std::vector<BadIndex> kBadIndices = {
    {"NotJson", index_text("{"), kCorrupt, {kIndex, "not valid JSON"}},
    {"Empty", index_text(""), kCorrupt, {kIndex, "not valid JSON"}},
    {"NoMap", index_text("{}"), kCorrupt, {kIndex, "weight_map", "given none"}},
    {"MapIsList", index_text(R"({"weight_map":[1]})"), kCorrupt, {kIndex, "weight_map", "[1]"}},
    {"MapIsEmpty", index_text(R"({"weight_map":{}})"), kCorrupt, {kIndex, "weight_map"}},
    {"FileIsNumber", index_entry("embed.weight", 7), kCorrupt, {kIndex, "embed.weight", "given 7"}},
    {"FileElsewhere",
     index_entry("embed.weight", "../other.safetensors"),
     kCorrupt,
     {kIndex, "embed.weight", "../other.safetensors"}},
    {"FileIsRooted", index_entry("embed.weight", "/etc/passwd"), kCorrupt, {kIndex, "/etc/passwd"}},
    {"FileIsFolder", index_entry("embed.weight", ".."), kCorrupt, {kIndex, "embed.weight"}},
    {"FileWithoutName", index_entry("embed.weight", ""), kCorrupt, {kIndex, "embed.weight"}},
    {"NameWithNul",
     index_entry("embed.weight", std::string("a\0b", 3)),
     kCorrupt,
     {kIndex, "embed.weight"}},
    {"MissingShard",
     [](const TempDir& dir) { std::filesystem::remove(dir.file("shard1.safetensors")); },
     kMissing,
     {"shard1.safetensors: missing", kIndex}},
    {"EmptyShard",
     [](const TempDir& dir) { write_file(dir.file("shard1.safetensors"), ""); },
     kCorrupt,
     {"shard1.safetensors", "given 0"}},
    {"TruncatedShard",
     [](const TempDir& dir) {
       std::filesystem::resize_file(dir.file("shard1.safetensors"),
                                    std::filesystem::file_size(dir.file("shard1.safetensors")) - 1);
     },
     kCorrupt,
     {"shard1.safetensors", "truncated"}},
    {"TensorNotInItsShard",
     index_entry("embed.weight", "shard1.safetensors"),
     kCorrupt,
     {"'embed.weight'", "expected in", "shard1.safetensors"}},
    {"TensorInNoShard",
     index_entry("invented.weight", "shard0.safetensors"),
     kCorrupt,
     {"'invented.weight'", "shard0.safetensors"}},
    {"TensorNotListed",
     [](const TempDir& dir) {
       auto index = nlohmann::json::parse(read_file(dir.file(kIndex)));
       index["weight_map"].erase("norm.weight");
       write_file(dir.file(kIndex), index.dump());
     },
     kCorrupt,
     {"'norm.weight'", "not listed", kIndex}},
};
INSTANTIATE_TEST_SUITE_P(Table, BadIndexTest, ::testing::ValuesIn(kBadIndices),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(OpenCheckpoint, FoldersWithoutCheckpoint) {
  const TempDir dir;
  expect_error(kMissing, {dir.path(), "model.safetensors.index.json", "model.safetensors"},
               [&] { open_checkpoint(dir.path(), small_config()); });
  expect_error(kMissing, {dir.file("none")},
               [&] { open_checkpoint(dir.file("none"), small_config()); });
  write_file(dir.file("file"), "x");
  expect_error(kMissing, {dir.file("file"), "folder"},
               [&] { open_checkpoint(dir.file("file"), small_config()); });
}

}  // namespace
}  // namespace dsv4::testing
