// The oracle's attention layer against golden outputs in V4-Flash's geometry: hidden 4096, 64
// heads, 8 groups, 64 index heads. Lengths 1 and 200; longer ones take the oracle minutes.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/oracle/attention.h"
#include "tests/oracle/checkpoint.h"
#include "tests/oracle/formula.h"
#include "tests/testing/tolerance.h"

namespace oracle {
namespace {

using dsv4::testing::close_to_largest;

const std::string kData = std::string(DSV4_SOURCE_DIR) + "/tests/golden/data/";

// The stored values are float32 results; their README measured about 1e-6 of the largest value
// against another float64 program, single elements of long sums a few times that.
constexpr double kFraction = 1e-5;
constexpr uint64_t kSeed = 1;

class FlashGeometry : public ::testing::TestWithParam<const char*> {
 protected:
  FlashGeometry() {
    std::ifstream file(kData + "manifest.json");
    manifest_ = nlohmann::json::parse(file);
  }
  // A tensor of the manifest; its listed checksum must agree.
  Weight make(const std::string& group, const std::string& name) const {
    const nlohmann::json& entry = manifest_.at("flash_attention").at(group).at(name);
    const auto shape = entry.at("shape").get<std::vector<int64_t>>();
    Weight out;
    out.rows = shape.size() == 1 ? 1 : shape[0];
    out.cols = shape.back();
    const Formula formula(name, kSeed);
    const double scale = entry.at("scale"), offset = entry.at("offset");
    int64_t sum_of_bits = 0;
    for (int64_t i = 0; i < out.rows * out.cols; ++i) {
      const float value = formula.value(i, scale, offset);
      out.values.push_back(value);
      sum_of_bits += std::bit_cast<uint32_t>(value) >> 16;
    }
    EXPECT_EQ(sum_of_bits, entry.at("sum_of_bf16_bits").get<int64_t>()) << name;
    return out;
  }
  nlohmann::json manifest_;
};

TEST_P(FlashGeometry, Agrees) {
  const std::string kind = GetParam();
  const auto weight = [&](const std::string& name) { return make("weights", kind + "." + name); };
  const auto compressor = [&](const std::string& prefix) {
    return CompressorWeights{weight(prefix + "wkv.weight"), weight(prefix + "wgate.weight"),
                             weight(prefix + "ape"), weight(prefix + "norm.weight")};
  };
  AttentionShape shape;
  shape.num_heads = 64;
  shape.groups = 8;
  shape.ratio = kind == "sliding" ? 0 : kind == "csa" ? 4 : 128;
  shape.index_heads = 64;
  shape.index_topk = 512;
  shape.frequencies = manifest_.at("rope")
                          .at(shape.ratio == 0 ? "main_inv_freq" : "compress_inv_freq")
                          .get<std::vector<float>>();
  AttentionWeights weights{weight("wq_a.weight"),
                           weight("q_norm.weight"),
                           weight("wq_b.weight"),
                           weight("wkv.weight"),
                           weight("kv_norm.weight"),
                           weight("attn_sink"),
                           weight("wo_a.weight"),
                           weight("wo_b.weight"),
                           {},
                           {}};
  if (shape.ratio != 0) weights.compressor = compressor("compressor.");
  if (shape.indexer()) {
    weights.indexer = {weight("indexer.wq_b.weight"), weight("indexer.weights_proj.weight"),
                       compressor("indexer.compressor.")};
  }

  const Tensors golden(kData + "flash_attention.safetensors");
  for (const auto& [length, input] : {std::pair<std::string, std::string>{"len0001", "x.1"},
                                      std::pair<std::string, std::string>{"len0200", "x.200"}}) {
    const std::string prefix = kind + "/" + length + "/";
    SCOPED_TRACE(prefix);
    const Weight x_values = make("inputs", input);
    Matrix x(x_values.rows, x_values.cols);
    x.values.assign(x_values.values.begin(), x_values.values.end());
    const std::vector<int64_t> positions = golden.integers(prefix + "positions");
    const AttentionTrace trace = attention(x, positions, weights, shape, kExact);

    const auto check = [&](const std::string& name, const Vector& actual) {
      EXPECT_TRUE(
          close_to_largest(prefix + name, actual, golden.matrix(prefix + name).values, kFraction));
    };
    const auto rows = [](const Matrix& m, const std::vector<int64_t>& which) {
      Vector out;
      for (int64_t r : which) out.insert(out.end(), m.row(r).begin(), m.row(r).end());
      return out;
    };
    check("attn_out", trace.out.values);
    check("kv", rows(trace.kv, positions));
    if (golden.has(prefix + "compressed")) {
      check("compressed", rows(trace.compressed, golden.integers(prefix + "entries")));
    }
    if (golden.has(prefix + "index_scores")) check("index_scores", trace.index_scores.values);
    if (golden.has(prefix + "attn_before_o")) {  // of the last position
      const std::vector<int64_t> last{static_cast<int64_t>(positions.size()) - 1};
      check("attn_before_o", rows(trace.attn_before_o, last));
      check("q", rows(trace.q, last));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, FlashGeometry, ::testing::Values("sliding", "csa", "hca"));

}  // namespace
}  // namespace oracle
