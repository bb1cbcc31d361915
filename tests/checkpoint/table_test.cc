// The table of tensors against the published totals and the tensors of a released-style folder.
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

const std::string kRoot = DSV4_SOURCE_DIR;

int64_t total_bytes(const std::vector<ExpectedTensor>& tensors) {
  int64_t out = 0;
  for (const ExpectedTensor& tensor : tensors) out += tensor.num_bytes();
  return out;
}
std::map<std::string, ExpectedTensor> by_name(const std::vector<ExpectedTensor>& tensors) {
  std::map<std::string, ExpectedTensor> out;
  for (const ExpectedTensor& tensor : tensors) out.emplace(tensor.name, tensor);
  return out;
}

TEST(TensorTable, PublishedTotals) {
  const auto pro = expected_tensors(ModelConfig::load(kRoot + "/configs/v4-pro.json"));
  EXPECT_EQ(pro.size(), 145116u);
  EXPECT_EQ(total_bytes(pro), 864704792696);
  const auto flash = expected_tensors(ModelConfig::load(kRoot + "/configs/v4-flash.json"));
  EXPECT_EQ(flash.size(), 69187u);
  EXPECT_EQ(total_bytes(flash), 159609485896);
}

TEST(TensorTable, NamesAreUnique) {
  const auto flash = expected_tensors(ModelConfig::load(kRoot + "/configs/v4-flash.json"));
  EXPECT_EQ(by_name(flash).size(), flash.size());
}

TEST(TensorTable, RowsOfTheSpecification) {
  const auto pro = by_name(expected_tensors(ModelConfig::load(kRoot + "/configs/v4-pro.json")));
  struct Row {
    const char* name;
    std::vector<int64_t> shape;
    DType dtype;
  };
  const Row kRows[] = {
      {"embed.weight", {129280, 7168}, DType::kBf16},
      {"hc_head_fn", {4, 28672}, DType::kF32},
      {"hc_head_scale", {1}, DType::kF32},
      {"layers.0.hc_attn_fn", {24, 28672}, DType::kF32},
      {"layers.0.hc_ffn_scale", {3}, DType::kF32},
      {"layers.0.attn.attn_sink", {128}, DType::kF32},
      {"layers.0.attn.wq_b.weight", {65536, 1536}, DType::kF8E4M3},
      {"layers.0.attn.wq_b.scale", {512, 12}, DType::kF8E8M0},
      {"layers.0.attn.wo_a.weight", {16384, 4096}, DType::kF8E4M3},
      {"layers.0.attn.wo_b.scale", {56, 128}, DType::kF8E8M0},
      {"layers.0.attn.compressor.ape", {128, 512}, DType::kF32},
      {"layers.2.attn.compressor.ape", {4, 1024}, DType::kF32},
      {"layers.2.attn.compressor.wkv.weight", {1024, 7168}, DType::kBf16},
      {"layers.2.attn.indexer.wq_b.scale", {64, 12}, DType::kF8E8M0},
      {"layers.2.attn.indexer.compressor.wgate.weight", {256, 7168}, DType::kBf16},
      {"layers.2.ffn.gate.tid2eid", {129280, 6}, DType::kI64},
      {"layers.3.ffn.gate.bias", {384}, DType::kF32},
      {"layers.3.ffn.experts.383.w2.weight", {7168, 1536}, DType::kF4E2M1},
      {"layers.3.ffn.experts.383.w2.scale", {7168, 96}, DType::kF8E8M0},
      {"layers.3.ffn.shared_experts.w1.scale", {24, 56}, DType::kF8E8M0},
      {"mtp.0.e_proj.weight", {7168, 7168}, DType::kF8E4M3},
      {"mtp.0.hc_head_base", {4}, DType::kF32},
      {"mtp.0.ffn.gate.bias", {384}, DType::kF32},
  };
  for (const Row& row : kRows) {
    const auto it = pro.find(row.name);
    ASSERT_NE(it, pro.end()) << row.name;
    EXPECT_EQ(it->second.shape, row.shape) << row.name;
    EXPECT_EQ(it->second.dtype, row.dtype) << row.name;
  }
  for (const char* name :
       {"layers.2.ffn.gate.bias", "layers.3.ffn.gate.tid2eid", "layers.3.attn.indexer.wq_b.weight",
        "mtp.0.attn.compressor.ape", "mtp.1.norm.weight", "layers.61.attn_norm.weight"}) {
    EXPECT_EQ(pro.count(name), 0u) << name;
  }
}

TEST(TensorTable, ExpertFormats) {
  nlohmann::json document = small_config_json();
  const auto dtype_of = [&](const char* format) {
    document["expert_dtype"] = format;
    return by_name(expected_tensors(ModelConfig::parse(document.dump(), "c")));
  };
  const char* weight = "layers.0.ffn.experts.2.w1.weight";
  const char* scale = "layers.0.ffn.experts.2.w1.scale";
  EXPECT_EQ(dtype_of("fp4").at(weight).shape, (std::vector<int64_t>{32, 32}));
  EXPECT_EQ(dtype_of("fp4").at(scale).shape, (std::vector<int64_t>{32, 2}));
  EXPECT_EQ(dtype_of("fp8").at(weight).dtype, DType::kF8E4M3);
  EXPECT_EQ(dtype_of("fp8").at(weight).shape, (std::vector<int64_t>{32, 64}));
  EXPECT_EQ(dtype_of("fp8").at(scale).shape, (std::vector<int64_t>{1, 1}));
  EXPECT_EQ(dtype_of("bf16").at(weight).dtype, DType::kBf16);
  EXPECT_EQ(dtype_of("bf16").count(scale), 0u);
}

TEST(TensorTable, OneLayerIsPartOfTheWhole) {
  const ModelConfig config = small_config();
  const auto whole = by_name(expected_tensors(config));
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".attn.";
    std::set<std::string> names;
    for (const ExpectedTensor& tensor :
         expected_attention_tensors(config, config.layer_kind(layer), prefix)) {
      names.insert(tensor.name);
      ASSERT_EQ(whole.count(tensor.name), 1u) << tensor.name;
      EXPECT_EQ(whole.at(tensor.name).shape, tensor.shape);
      EXPECT_EQ(whole.at(tensor.name).dtype, tensor.dtype);
    }
    for (const auto& item : whole) {
      if (!item.first.starts_with(prefix)) continue;
      EXPECT_EQ(names.count(item.first), 1u) << item.first;
    }
  }
}

}  // namespace
}  // namespace dsv4::testing
