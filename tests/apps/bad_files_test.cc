// Wrong model folders: configs, checkpoints and tokenizers that are cut, mutated or inconsistent.
// Each gets its one error. To add a case, add a row with the change to a copy of the small model.
#include "tests/apps/refusal.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct BrokenModel {
  std::string name;
  std::function<void(const std::string& folder)> breaks;
  std::vector<std::string> message;
};
void PrintTo(const BrokenModel& model, std::ostream* out) {
  *out << model.name;
}

const std::string kShard = "model-00002-of-00004.safetensors";
const std::string kIndex = "model.safetensors.index.json";

// The copy is made of links; what a case changes becomes a file of its own.
void replace(const std::string& folder, const std::string& name, const std::string& bytes) {
  fs::remove(folder + "/" + name);
  write_file(folder + "/" + name, bytes);
}

std::function<void(const std::string&)> file_is(const std::string& name, const std::string& bytes) {
  return [=](const std::string& folder) { replace(folder, name, bytes); };
}
std::function<void(const std::string&)> file_is_gone(const std::string& name) {
  return [=](const std::string& folder) { fs::remove(folder + "/" + name); };
}
std::function<void(const std::string&)> file_is_cut(const std::string& name, double part) {
  return [=](const std::string& folder) {
    const std::string bytes = read_file(folder + "/" + name);
    replace(folder, name,
            bytes.substr(0, static_cast<size_t>(static_cast<double>(bytes.size()) * part)));
  };
}
std::function<void(const std::string&)> json_has(const std::string& name, const json& patch) {
  return [=](const std::string& folder) {
    json object = json::parse(read_file(folder + "/" + name));
    object.merge_patch(patch);
    replace(folder, name, object.dump());
  };
}
std::function<void(const std::string&)> config_has(const json& patch) {
  return json_has("config.json", patch);
}
// Changes the header and data of the shard that holds most layers.
std::function<void(const std::string&)> shard_has(
    const std::function<void(json& header, std::string& data)>& change) {
  return [=](const std::string& folder) {
    const std::string bytes = read_file(folder + "/" + kShard);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    json header = json::parse(bytes.substr(8, length));
    std::string data = bytes.substr(8 + length);
    change(header, data);
    replace(folder, kShard, raw_safetensors(header.dump(), data));
  };
}
std::function<void(const std::string&)> header_has(const json& patch) {
  return shard_has([=](json& header, std::string&) { header.merge_patch(patch); });
}
// Overwrites the first bytes of a tensor.
std::function<void(const std::string&)> tensor_begins(const std::string& tensor,
                                                      const std::string& bytes) {
  return shard_has([=](json& header, std::string& data) {
    data.replace(header.at(tensor).at("data_offsets").at(0).get<size_t>(), bytes.size(), bytes);
  });
}

std::vector<BrokenModel> config_cases() {
  return {
      {"ConfigGone", file_is_gone("config.json"), {"not found", "config.json"}},
      {"ConfigEmpty", file_is("config.json", ""), {"config.json: not valid JSON"}},
      {"ConfigCut", file_is_cut("config.json", 0.5), {"config.json: not valid JSON"}},
      {"ConfigArray", file_is("config.json", "[1, 2]"), {"expected a JSON object"}},
      {"ConfigDeep",
       file_is("config.json", std::string(100000, '[')),
       {"config.json", "nested deeper"}},
      {"ConfigKeyTwice",
       file_is("config.json", R"({"vocab_size": 1, "vocab_size": 2})"),
       {"'vocab_size' is given twice"}},
      {"ConfigNotUtf8",
       file_is("config.json", "{\"a\": \"\xff\"}"),
       {"config.json: not valid JSON"}},
      {"ConfigNanLiteral", file_is("config.json", R"({"hc_eps": NaN})"), {"not valid JSON"}},
      {"ConfigEverythingMissing",
       file_is("config.json", "{}"),
       {"vocab_size: missing", "compress_ratios: missing", "hc_mult: missing"}},
      {"ConfigFieldMissing",
       config_has({{"hidden_size", nullptr}}),
       {"hidden_size: missing, expected an integer"}},
      {"ConfigFieldText", config_has({{"hidden_size", "256"}}), {"hidden_size", "given \"256\""}},
      {"ConfigFieldNegative", config_has({{"vocab_size", -1}}), {"vocab_size", "given -1"}},
      {"ConfigFieldHuge", config_has({{"vocab_size", 1e30}}), {"vocab_size", "16777216"}},
      {"ConfigNoHeads", config_has({{"num_attention_heads", 0}}), {"num_attention_heads"}},
      {"ConfigGroups", config_has({{"o_groups", 3}}), {"o_groups", "divisor", "given 3"}},
      {"ConfigHeadDim", config_has({{"head_dim", 256}}), {"head_dim"}},
      {"ConfigRopeDim", config_has({{"qk_rope_head_dim", 63}}), {"qk_rope_head_dim", "even"}},
      {"ConfigRatio",
       config_has({{"compress_ratios", {0, 4, 64, 4}}}),
       {"compress_ratios[2]", "4 (CSA) or 128 (HCA)", "given 64"}},
      {"ConfigRatiosShort", config_has({{"compress_ratios", {0, 4}}}), {"expected 4 entries"}},
      {"ConfigRopeType", config_has({{"rope_scaling", {{"type", "linear"}}}}), {"yarn", "linear"}},
      {"ConfigExpertsPerToken",
       config_has({{"num_experts_per_tok", 17}}),
       {"num_experts_per_tok", "at most n_routed_experts = 16"}},
      {"ConfigExpertType", config_has({{"expert_dtype", "int4"}}), {"expert_dtype", "\"int4\""}},
      {"ConfigBlockSize",
       config_has({{"quantization_config", {{"weight_block_size", {128}}}}}),
       {"weight_block_size"}},
      {"ConfigAnotherModel", config_has({{"model_type", "llama"}}), {"model_type", "\"llama\""}},
      {"ConfigOfMoreLayers",
       config_has({{"num_hidden_layers", 5}, {"compress_ratios", {0, 4, 128, 4, 0}}}),
       {"layers.4.", "missing"}},
      {"ConfigOfAnotherWidth",
       config_has({{"hidden_size", 512}}),
       {"embed.weight", "[4096, 512]", "given [4096, 256]"}},
      {"ConfigOfASmallerVocabulary",
       config_has({{"vocab_size", 2048}}),
       {"embed.weight", "[2048, 256]", "given [4096, 256]"}},
  };
}

std::vector<BrokenModel> checkpoint_cases() {
  const std::string scale = "layers.1.attn.wq_a.scale", weight = "layers.1.attn.wq_a.weight";
  const std::string huge_length("\xff\xff\xff\xff\xff\xff\xff\x7f", 8);
  return {
      {"IndexEmpty", file_is(kIndex, ""), {kIndex, "not valid JSON"}},
      {"IndexWithoutMap", file_is(kIndex, "{}"), {kIndex, "weight_map"}},
      {"IndexOutsideFolder",
       json_has(kIndex, {{"weight_map", {{"embed.weight", "../x.safetensors"}}}}),
       {"weight_map['embed.weight']", "../x.safetensors"}},
      {"IndexOfAbsentFile",
       json_has(kIndex, {{"weight_map", {{"embed.weight", "x.safetensors"}}}}),
       {"x.safetensors: missing"}},
      {"IndexOfAbsentTensor",
       json_has(kIndex, {{"weight_map", {{"embed.weights", kShard}}}}),
       {"'embed.weights'", "not there"}},
      {"IndexLacksTensor",
       json_has(kIndex, {{"weight_map", {{weight, nullptr}}}}),
       {weight, "not listed"}},
      {"ShardGone", file_is_gone(kShard), {kShard + ": missing"}},
      {"ShardEmpty", file_is(kShard, ""), {kShard, "at least 8 bytes, given 0"}},
      {"ShardOfHeaderLengthOnly", file_is_cut(kShard, 1e-6), {kShard}},
      {"ShardCutInHeader", file_is_cut(kShard, 0.001), {kShard, "header length"}},
      {"ShardCutInData", file_is_cut(kShard, 0.9), {kShard, "the file is truncated"}},
      {"ShardHeaderLength", file_is(kShard, huge_length + "{}"), {kShard, "9223372036854775807"}},
      {"ShardHeaderNotJson",
       file_is(kShard, raw_safetensors("{nope", "")),
       {kShard, "not valid JSON"}},
      {"ShardHeaderArray", file_is(kShard, raw_safetensors("[]", "")), {kShard, "JSON object"}},
      {"ShardIsAFolder",
       [](const std::string& folder) {
         fs::remove(folder + "/" + kShard);
         fs::create_directory(folder + "/" + kShard);
       },
       {kShard, "a directory"}},
      {"TensorGone",
       shard_has([=](json& header, std::string&) { header.erase(weight); }),
       {weight, "not there"}},
      {"TensorShape",
       header_has({{weight, {{"shape", {256, 128}}}}}),
       {weight, "expected [128, 256]", "q_lora_rank x hidden_size", "given [256, 128]"}},
      {"TensorShapeOfOtherSize",
       header_has({{weight, {{"shape", {128, 255}}}}}),
       {weight, "data_offsets", "expected 32640 bytes"}},
      {"TensorShapeNegative", header_has({{weight, {{"shape", {-128, -256}}}}}), {weight, "shape"}},
      {"TensorShapeOverflow",
       header_has({{weight, {{"shape", {4294967296, 4294967296}}}}}),
       {weight, "shape"}},
      {"TensorDtype", header_has({{weight, {{"dtype", "I8"}}}}), {weight, "f8_e4m3"}},
      {"TensorDtypeUnknown", header_has({{weight, {{"dtype", "Q4_K"}}}}), {weight, "\"Q4_K\""}},
      {"TensorOffsetsBackwards",
       header_has({{weight, {{"data_offsets", {64, 0}}}}}),
       {weight, "data_offsets"}},
      {"TensorOffsetsOutside",
       shard_has([=](json& header, std::string& data) {
         json& offsets = header[weight]["data_offsets"];
         offsets = {data.size(), data.size() + 128 * 256};
       }),
       {weight, "truncated"}},
      {"TensorOverlaps",
       shard_has([=](json& header, std::string&) {
         const auto end = header[weight]["data_offsets"][1].get<int64_t>();
         header[weight]["data_offsets"] = {end - 128 * 256 - 1, end - 1};
       }),
       {"data_offsets: expected a begin of at least"}},
      {"TensorUnknown",
       shard_has([](json& header, std::string& data) {
         header["layers.1.attn.wq_c.weight"] = {
             {"dtype", "U8"}, {"shape", {4}}, {"data_offsets", {data.size(), data.size() + 4}}};
         data += "abcd";
       }),
       {"layers.1.attn.wq_c.weight", "not listed"}},
      {"TensorRenamed",
       shard_has([=](json& header, std::string&) {
         header["layers.1.attn.wq_c.weight"] = header[weight];
         header.erase(weight);
       }),
       {weight, "not there"}},
      // 255 is NaN as a UE8M0 scale, 0x7f as an E4M3 number, 0x7fc00000 as a float.
      {"ScaleNan", tensor_begins(scale, "\xff"), {scale, "[0, 0]"}},
      {"WeightNan", tensor_begins(weight, "\x7f"), {weight, "[0, 0]"}},
      {"SinkNan",
       tensor_begins("layers.0.attn.attn_sink", std::string("\x00\x00\xc0\x7f", 4)),
       {"layers.0.attn.attn_sink"}},
      // Expert 16 of 16 in the table of a hash-routed layer: would be read out of bounds.
      {"HashExpertOutside",
       tensor_begins("layers.0.ffn.gate.tid2eid", std::string("\x10\0\0\0\0\0\0\0", 8)),
       {"layers.0.ffn.gate.tid2eid", "16"}},
      {"HashExpertNegative",
       tensor_begins("layers.1.ffn.gate.tid2eid", std::string(8, '\xff')),
       {"layers.1.ffn.gate.tid2eid", "-1"}},
  };
}

std::vector<BrokenModel> tokenizer_cases() {
  const std::string file = "tokenizer.json";
  return {
      {"TokenizerGone", file_is_gone(file), {file}},
      {"TokenizerEmpty", file_is(file, ""), {file, "not valid JSON"}},
      {"TokenizerCut", file_is_cut(file, 0.3), {file, "not valid JSON"}},
      {"TokenizerArray", file_is(file, "[]"), {file}},
      {"TokenizerWithoutModel", json_has(file, {{"model", nullptr}}), {file, "model"}},
      {"TokenizerOfAnotherModel", json_has(file, {{"model", {{"type", "Unigram"}}}}), {"Unigram"}},
      {"TokenizerIdText", json_has(file, {{"model", {{"vocab", {{"a", "x"}}}}}}), {file, "vocab"}},
      {"TokenizerIdNegative", json_has(file, {{"model", {{"vocab", {{"a", -5}}}}}}), {file, "-5"}},
  };
}

class BadFiles : public ::testing::TestWithParam<BrokenModel> {
 protected:
  BadFiles() : folder_(dir_.file("broken")) {
    fs::create_directory(folder_);
    for (const auto& entry : fs::directory_iterator(small_model())) {
      fs::create_symlink(entry.path(), fs::path(folder_) / entry.path().filename());
    }
    write_file(dir_.file("ids.json"), "[1, 2, 3]");
  }
  void expect_refused(const std::string& arguments) {
    Refusal refusal{GetParam().name, words(arguments), kBadInput, GetParam().message};
    expect_refusal(refusal, dir_.path());
  }
  TempDir dir_;
  std::string folder_;
};

TEST_P(BadFiles, GetTheirOneError) {
  const std::string logits = "logits -m @tmp/broken --last 1 -o @tmp/out/x.safetensors ";
  const bool tokenizer = GetParam().name.starts_with("Tokenizer");
  const std::string call = logits + (tokenizer ? "-p x" : "--ids @tmp/ids.json");
  ASSERT_NO_FATAL_FAILURE(GetParam().breaks(folder_));
  expect_refused(call);
}

TEST(BadFilesCopy, WorksBeforeItIsBroken) {
  const TempDir dir;
  for (const auto& entry : fs::directory_iterator(small_model())) {
    fs::create_symlink(entry.path(), fs::path(dir.path()) / entry.path().filename());
  }
  shard_has([](json&, std::string&) {})(dir.path());
  config_has(json::object())(dir.path());
  json_has(kIndex, json::object())(dir.path());
  json_has("tokenizer.json", json::object())(dir.path());
  const std::vector<std::string> rest{"-p", "JULIET:", "-n", "5"};
  std::string texts[2];
  for (const bool copy : {false, true}) {
    std::vector<std::string> arguments{"generate", "-m", copy ? dir.path() : small_model()};
    arguments.insert(arguments.end(), rest.begin(), rest.end());
    const Finished out = run_program(arguments);
    EXPECT_EQ(out.exit_code, 0) << out.err;
    texts[copy ? 1 : 0] = out.out;
  }
  EXPECT_EQ(texts[0], texts[1]);
}

std::string broken_name(const ::testing::TestParamInfo<BrokenModel>& info) {
  return info.param.name;
}
INSTANTIATE_TEST_SUITE_P(Config, BadFiles, ::testing::ValuesIn(config_cases()), broken_name);
INSTANTIATE_TEST_SUITE_P(Checkpoint, BadFiles, ::testing::ValuesIn(checkpoint_cases()),
                         broken_name);
INSTANTIATE_TEST_SUITE_P(Tokenizer, BadFiles, ::testing::ValuesIn(tokenizer_cases()), broken_name);

}  // namespace
}  // namespace dsv4::testing
