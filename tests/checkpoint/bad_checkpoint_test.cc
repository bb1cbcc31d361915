// Checkpoint folders that must be refused, each with the message that names the fault.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

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
