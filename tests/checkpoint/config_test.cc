// config.json: the released files, derived values, and everything that must be refused.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "dsv4/config.h"
#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;

const std::string kRoot = DSV4_SOURCE_DIR;

std::map<std::string, int> count_kinds(const ModelConfig& config) {
  std::map<std::string, int> out;
  for (int i = 0; i < config.num_hidden_layers; ++i) ++out[config.layer_kind(i).name()];
  return out;
}

TEST(Config, ReadsV4Flash) {
  const ModelConfig config = ModelConfig::load(kRoot + "/configs/v4-flash.json");
  EXPECT_EQ(config.vocab_size, 129280);
  EXPECT_EQ(config.hidden_size, 4096);
  EXPECT_EQ(config.num_heads, 64);
  EXPECT_EQ(config.nope_head_dim(), 448);
  EXPECT_EQ(config.group_width(), 4096);
  EXPECT_EQ(config.heads_per_group(), 8);
  EXPECT_EQ(config.index_topk, 512);
  EXPECT_EQ(config.hc_mix_rows(), 24);
  EXPECT_EQ(config.softmax_scale(), 0.04419417382415922f);
  EXPECT_EQ(config.index_scale(), static_cast<float>(1.0 / std::sqrt(8192.0)));
  EXPECT_EQ(config.routed_scaling_factor, 1.5f);
  EXPECT_EQ(config.expert_dtype, ExpertFormat::kFp4);
  EXPECT_EQ(config.compress_ratios.size(), 44u);
  EXPECT_EQ(count_kinds(config),
            (std::map<std::string, int>{{"sliding", 2}, {"csa", 21}, {"hca", 20}}));
  EXPECT_EQ(config.distinct_ratios(), (std::vector<int>{4, 128}));
  EXPECT_TRUE(config.is_hash_layer(2));
  EXPECT_FALSE(config.is_hash_layer(3));
  EXPECT_STREQ(config.layer_kind(42).name(), "csa");
}

TEST(Config, ReadsV4Pro) {
  const ModelConfig config = ModelConfig::load(kRoot + "/configs/v4-pro.json");
  EXPECT_EQ(config.hidden_size, 7168);
  EXPECT_EQ(config.num_heads, 128);
  EXPECT_EQ(config.group_width(), 4096);
  EXPECT_EQ(config.n_routed_experts, 384);
  EXPECT_EQ(config.routed_scaling_factor, 2.5f);
  EXPECT_EQ(count_kinds(config), (std::map<std::string, int>{{"csa", 30}, {"hca", 31}}));
}

TEST(Config, ReadsAFolder) {
  const ModelConfig config = ModelConfig::load(kRoot + "/models/tiny-shakespeare");
  EXPECT_EQ(config.num_hidden_layers, 4);
  EXPECT_EQ(config.num_nextn_predict_layers, 0);
  EXPECT_EQ(config.o_groups, 2);
  EXPECT_EQ(config.num_hash_layers, 2);
  EXPECT_EQ(config.swiglu_limit, 10.0f);
  EXPECT_EQ(config.hc_eps, 1e-6f);
}

TEST(Config, LayerKindsCarryTheirRope) {
  const ModelConfig config = small_config();
  const LayerKind sliding = config.layer_kind(0), csa = config.layer_kind(1);
  const LayerKind hca = config.layer_kind(2), mtp = config.layer_kind(3);
  for (const LayerKind& kind : {sliding, mtp}) {
    EXPECT_EQ(kind.compress_ratio, 0);
    EXPECT_EQ(kind.rope.theta, 10000.0);
    EXPECT_FALSE(kind.rope.yarn);
  }
  for (const LayerKind& kind : {csa, hca}) {
    EXPECT_EQ(kind.rope.theta, 160000.0);
    EXPECT_TRUE(kind.rope.yarn);
    EXPECT_EQ(kind.rope.factor, 16.0);
    EXPECT_EQ(kind.rope.original_max_position, 65536);
  }
  EXPECT_TRUE(csa.overlap && csa.indexer);
  EXPECT_FALSE(hca.overlap || hca.indexer);
  EXPECT_EQ(csa.pooled_tokens(), 8);
  EXPECT_EQ(hca.pooled_tokens(), 128);
  expect_error(ErrorCode::kInvalidArgument, {"layer index", "0 to 3", "4"},
               [&] { config.layer_kind(4); });
}

// ---- variations that are accepted ----

ModelConfig parse_with(const std::function<void(json&)>& change) {
  json document = small_config_json();
  change(document);
  return ModelConfig::parse(document.dump(), "config.json");
}

TEST(Config, AcceptsWhatReleasesDifferIn) {
  EXPECT_EQ(parse_with([](json& c) {
              c["compress_ratios"] = {0, 4, 128};
            }).compress_ratios.size(),
            3u);
  EXPECT_EQ(parse_with([](json& c) {
              c["compress_ratios"] = {0, 4, 128, 0, 0, 0};
            }).compress_ratios.size(),
            6u);
  const ModelConfig one = parse_with([](json& c) { c["compress_ratios"] = {1, 4, 128, 1}; });
  EXPECT_EQ(one.compress_ratios, (std::vector<int>{0, 4, 128, 0}));
  const ModelConfig rope_type = parse_with([](json& c) {
    c["rope_scaling"].erase("type");
    c["rope_scaling"]["rope_type"] = "yarn";
  });
  EXPECT_EQ(rope_type, small_config());
  const ModelConfig plain = parse_with([](json& c) { c["rope_scaling"] = nullptr; });
  EXPECT_FALSE(plain.layer_kind(1).rope.yarn);
  EXPECT_EQ(plain.layer_kind(1).rope.theta, 160000.0);
  EXPECT_EQ(parse_with([](json& c) { c["expert_dtype"] = "fp8"; }).expert_dtype,
            ExpertFormat::kFp8);
  EXPECT_EQ(parse_with([](json& c) { c["expert_dtype"] = "bf16"; }).expert_dtype,
            ExpertFormat::kBf16);
  const ModelConfig unquantised = parse_with([](json& c) {
    c.erase("quantization_config");
    c.erase("expert_dtype");
    c["o_lora_rank"] = 24;  // not bound to scale blocks then
  });
  EXPECT_EQ(unquantised.expert_dtype, ExpertFormat::kBf16);
  const ModelConfig blocks = parse_with([](json& c) {
    c["quantization_config"]["weight_block_size"] = {64, 32};
  });
  EXPECT_EQ(blocks.weight_block_rows, 64);
  EXPECT_EQ(blocks.weight_block_cols, 32);
  EXPECT_EQ(parse_with([](json& c) { c["max_position_embeddings"] = 4096.0; }), small_config());
  EXPECT_EQ(parse_with([](json& c) { c["some_new_field"] = {1, 2}; }), small_config());
  // Without an indexer its fields are not needed.
  const ModelConfig hca_only = parse_with([](json& c) {
    c["compress_ratios"] = {0, 128, 128};
    for (const char* name : {"index_n_heads", "index_head_dim", "index_topk"}) c.erase(name);
  });
  EXPECT_EQ(hca_only.distinct_ratios(), (std::vector<int>{128}));
}

// ---- what is refused ----

struct BadConfig {
  const char* name;
  std::function<void(json&)> change;
  std::vector<std::string> message;
};

class BadConfigTest : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefusedByName) {
  json document = small_config_json();
  GetParam().change(document);
  std::vector<std::string> parts = GetParam().message;
  parts.push_back("some/config.json");
  expect_error(ErrorCode::kInvalidArgument, parts,
               [&] { ModelConfig::parse(document.dump(), "some/config.json"); });
}

std::function<void(json&)> set(const char* name, json value) {
  return [=](json& c) { c[name] = value; };
}
std::function<void(json&)> set_in(const char* object, const char* name, json value) {
  return [=](json& c) { c[object][name] = value; };
}
std::function<void(json&)> erase(const char* name) {
  return [=](json& c) { c.erase(name); };
}

const std::vector<BadConfig> kBadConfigs = {
    {"MissingHiddenSize", erase("hidden_size"), {"hidden_size: missing"}},
    {"NullHiddenSize", set("hidden_size", nullptr), {"hidden_size: missing"}},
    {"MissingRatios", erase("compress_ratios"), {"compress_ratios: missing", "layer_types"}},
    {"NegativeHeads", set("num_attention_heads", -4), {"num_attention_heads", "given -4"}},
    {"ZeroHeads", set("num_attention_heads", 0), {"num_attention_heads", "given 0"}},
    {"HugeVocab", set("vocab_size", 4000000000u), {"vocab_size", "given 4000000000"}},
    {"Beyond63Bits",
     set("hidden_size", 18446744073709551615u),
     {"hidden_size", "1844674407370955"}},
    {"FractionalHeadDim", set("head_dim", 64.5), {"head_dim", "an integer", "64.5"}},
    {"TextForNumber", set("head_dim", "64"), {"head_dim", "\"64\""}},
    {"BoolForNumber", set("o_groups", true), {"o_groups", "given true"}},
    {"ListForNumber", set("q_lora_rank", {1, 2}), {"q_lora_rank", "given [1,2]"}},
    {"ObjectForNumber", set("hc_mult", json::object()), {"hc_mult", "given {}"}},
    {"ManyLayers", set("num_hidden_layers", 100000), {"num_hidden_layers", "given 100000"}},
    {"ManyExperts",
     [](json& c) {
       c["num_hidden_layers"] = 512;
       c["n_routed_experts"] = 4096;
     },
     {"n_routed_experts", "512 x 4096 = 2097152"}},
    {"UnknownRatio", set("compress_ratios", {0, 8, 128}), {"compress_ratios[1]", "given 8"}},
    {"NegativeRatio", set("compress_ratios", {0, -4, 128}), {"compress_ratios[1]", "given -4"}},
    {"TextRatio", set("compress_ratios", {0, "4", 128}), {"compress_ratios[1]", "\"4\""}},
    {"FewRatios", set("compress_ratios", {0, 4}), {"compress_ratios", "3 entries", "given 2"}},
    {"ManyRatios",
     set("compress_ratios", {0, 4, 128, 0, 0, 0, 0}),
     {"compress_ratios", "3 entries", "given 7"}},
    {"CompressedMtp", set("compress_ratios", {0, 4, 128, 4}), {"compress_ratios[3]", "MTP"}},
    {"RatiosAreNoList", set("compress_ratios", 4), {"compress_ratios", "an array"}},
    {"GroupsDoNotDivide", set("o_groups", 3), {"o_groups", "num_attention_heads = 4", "given 3"}},
    {"OddRope", set("qk_rope_head_dim", 15), {"qk_rope_head_dim", "even", "given 15"}},
    {"RopeAsWideAsHead", set("qk_rope_head_dim", 64), {"qk_rope_head_dim", "head_dim = 64"}},
    {"IndexNarrowerThanRope",
     set("index_head_dim", 8),
     {"index_head_dim", "qk_rope_head_dim = 16"}},
    {"MissingIndexer", erase("index_topk"), {"index_topk: missing"}},
    {"MoreChosenThanExperts", set("num_experts_per_tok", 4), {"num_experts_per_tok", "given 4"}},
    {"MoreHashLayersThanLayers", set("num_hash_layers", 4), {"num_hash_layers", "given 4"}},
    {"TwoSharedExperts", set("n_shared_experts", 2), {"n_shared_experts", "given 2"}},
    {"RaggedFp4Input", set("hidden_size", 72), {"hidden_size", "multiple of 32", "72"}},
    {"RaggedFp4Width", set("moe_intermediate_size", 40), {"moe_intermediate_size", "40"}},
    {"StraddlingScaleBlock", set("o_lora_rank", 64), {"o_lora_rank", "multiple of", "given 64"}},
    {"OtherModel", set("model_type", "deepseek_v3"), {"model_type", "deepseek_v3"}},
    {"KvHeads", set("num_key_value_heads", 4), {"num_key_value_heads", "given 4"}},
    {"OtherScoring", set("scoring_func", "sigmoid"), {"scoring_func", "sigmoid"}},
    {"OtherTopK", set("topk_method", "greedy"), {"topk_method", "greedy"}},
    {"NoNormalisation", set("norm_topk_prob", false), {"norm_topk_prob", "given false"}},
    {"OtherActivation", set("hidden_act", "gelu"), {"hidden_act", "gelu"}},
    {"TiedEmbeddings", set("tie_word_embeddings", true), {"tie_word_embeddings", "given true"}},
    {"AttentionBias", set("attention_bias", true), {"attention_bias", "given true"}},
    {"UnknownExpertType", set("expert_dtype", "int4"), {"expert_dtype", "int4"}},
    {"ExpertTypeIsNumber", set("expert_dtype", 4), {"expert_dtype", "given 4"}},
    {"OtherQuantisation",
     set_in("quantization_config", "quant_method", "awq"),
     {"quantization_config.quant_method", "awq"}},
    {"OtherScales",
     set_in("quantization_config", "scale_fmt", "float"),
     {"quantization_config.scale_fmt", "float"}},
    {"BlockOfThree",
     set_in("quantization_config", "weight_block_size", {128, 128, 128}),
     {"weight_block_size", "[128,128,128]"}},
    {"ZeroBlock",
     set_in("quantization_config", "weight_block_size", {0, 128}),
     {"weight_block_size", "[0,128]"}},
    {"OddBlock",
     set_in("quantization_config", "weight_block_size", {128, 100}),
     {"weight_block_size", "[128,100]"}},
    {"QuantisationIsText", set("quantization_config", "fp8"), {"quantization_config", "an object"}},
    {"OtherRopeScaling",
     set_in("rope_scaling", "type", "linear"),
     {"rope_scaling.type", "yarn", "linear"}},
    {"UntypedRopeScaling",
     [](json& c) { c["rope_scaling"].erase("type"); },
     {"rope_scaling.type: missing"}},
    {"RopeScalingIsList", set("rope_scaling", {1}), {"rope_scaling", "an object"}},
    {"RopeFactorBelowOne", set_in("rope_scaling", "factor", 0.5), {"rope_scaling.factor", "0.5"}},
    {"NoOriginalLength",
     set_in("rope_scaling", "original_max_position_embeddings", 0),
     {"rope_scaling.original_max_position_embeddings", "given 0"}},
    {"BetasCross", set_in("rope_scaling", "beta_fast", 0.5), {"rope_scaling.beta_fast", "0.5"}},
    {"ThetaOne", set("rope_theta", 1.0), {"rope_theta", "given 1.0"}},
    {"ZeroEpsilon", set("rms_norm_eps", 0), {"rms_norm_eps", "given 0"}},
    {"NegativeLimit", set("swiglu_limit", -1.0), {"swiglu_limit", "given -1.0"}},
    {"BeginBeyondVocab", set("bos_token_id", 24), {"bos_token_id", "vocab_size = 24"}},
    {"EndBeyondVocab", set("eos_token_id", 99), {"eos_token_id", "given 99"}},
    {"EndIsList", set("eos_token_id", {1, 2}), {"eos_token_id", "given [1,2]"}},
};
INSTANTIATE_TEST_SUITE_P(Table, BadConfigTest, ::testing::ValuesIn(kBadConfigs),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Config, OneErrorListsEverything) {
  json document = small_config_json();
  document["head_dim"] = -1;
  document["o_groups"] = 3;
  document["compress_ratios"] = {0, 5, 6};
  document.erase("hc_mult");
  expect_error(ErrorCode::kInvalidArgument,
               {"head_dim", "o_groups", "compress_ratios[1]", "compress_ratios[2]", "given 6",
                "hc_mult: missing"},
               [&] { ModelConfig::parse(document.dump(), "c"); });
}

TEST(Config, LongListsAreShortenedInMessages) {
  json document = small_config_json();
  document["num_hidden_layers"] = 400;
  document["compress_ratios"] = std::vector<int>(400, 7);
  expect_error(ErrorCode::kInvalidArgument, {"compress_ratios[0]", "392 more"},
               [&] { ModelConfig::parse(document.dump(), "c"); });
}

struct BadText {
  const char* name;
  std::string text;
  std::string message;
};
class BadTextTest : public ::testing::TestWithParam<BadText> {};

TEST_P(BadTextTest, IsNoJson) {
  expect_error(ErrorCode::kDataCorrupt, {"some/config.json", GetParam().message},
               [&] { ModelConfig::parse(GetParam().text, "some/config.json"); });
}

const std::vector<BadText> kBadTexts = {
    {"Empty", "", "not valid JSON"},
    {"Spaces", "   ", "not valid JSON"},
    {"NulBytes", std::string(16, '\0'), "not valid JSON"},
    {"Truncated", "{\"head_dim\": 51", "not valid JSON"},
    {"TrailingText", "{} {}", "not valid JSON"},
    {"NanLiteral", "{\"rope_theta\": NaN}", "not valid JSON"},
    {"NumberTooLarge", "{\"rope_theta\": 1e999}", "not valid JSON"},
    {"NotUtf8", "{\"model_type\": \"\xff\xfe\"}", "not valid JSON"},
    {"NotAnObject", "[1, 2]", "expected a JSON object"},
    {"JustANumber", "7", "expected a JSON object"},
    {"KeyTwice", "{\"head_dim\": 64, \"head_dim\": 128}", "'head_dim' is given twice"},
    {"NestedArrays", std::string(1000000, '['), "nested deeper"},
    {"NestedObjects",
     [] {
       std::string out;
       for (int i = 0; i < 100000; ++i) out += "{\"a\":";
       return out;
     }(),
     "nested deeper"},
};
INSTANTIATE_TEST_SUITE_P(Table, BadTextTest, ::testing::ValuesIn(kBadTexts),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Config, MissingFilesAreNamed) {
  const TempDir dir;
  expect_error(ErrorCode::kNotFound, {dir.path() + "/config.json"},
               [&] { ModelConfig::load(dir.path()); });
  expect_error(ErrorCode::kNotFound, {dir.file("none.json")},
               [&] { ModelConfig::load(dir.file("none.json")); });
  expect_error(ErrorCode::kInvalidArgument, {"/dev/null", "regular file"},
               [&] { ModelConfig::load("/dev/null"); });
}

}  // namespace
}  // namespace dsv4::testing
