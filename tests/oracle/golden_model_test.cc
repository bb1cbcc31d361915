// The oracle's whole model against the golden tensors of the small model: every stage of every
// layer, and logits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/oracle/model.h"
#include "tests/testing/tolerance.h"

namespace oracle {
namespace {

using dsv4::testing::close_to_largest;

const std::string kData = std::string(DSV4_SOURCE_DIR) + "/tests/golden/data/";

// The stored values are float32 results of another program, whose own error is what differs. Its
// README puts that at about 1e-6 of the largest value of a tensor; values that went through all
// layers collect more, and 1e-5 leaves room for the worst element of any tensor.
constexpr double kFraction = 1e-5;
// Where the margin of a choice is below this, float32 may choose differently (README).
constexpr double kFirmMargin = 1e-5;

Vector rows_at(const Matrix& m, const std::vector<int64_t>& rows) {
  Vector out;
  for (int64_t r : rows) out.insert(out.end(), m.row(r).begin(), m.row(r).end());
  return out;
}

Model load_model() {
  Model model(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
  // The golden run's frequencies: its last bits are those of another power function.
  std::ifstream file(kData + "manifest.json");
  const nlohmann::json rope = nlohmann::json::parse(file).at("rope");
  for (AttentionShape& layer : model.shape().layers) {
    const auto given =
        rope.at(layer.ratio == 0 ? "main_inv_freq" : "compress_inv_freq").get<std::vector<float>>();
    for (size_t i = 0; i < given.size(); ++i) {  // 2 units in the last place (attention.md 3)
      EXPECT_NEAR(layer.frequencies[i] / given[i], 1.0, 2 * 0x1p-23) << i;
    }
    layer.frequencies = given;
  }
  return model;
}

void check_layer(const std::string& prefix, const Tensors& golden, const LayerTrace& layer,
                 const AttentionShape& shape, const std::vector<int64_t>& positions) {
  SCOPED_TRACE(prefix);
  const auto check = [&](const std::string& name, const Vector& actual) {
    EXPECT_TRUE(
        close_to_largest(prefix + name, actual, golden.matrix(prefix + name).values, kFraction));
  };
  const AttentionTrace& attention = layer.attention;
  check("attn_in", layer.attn_in.values);
  check("q", rows_at(attention.q, positions));
  const bool all_kv = golden.stored(prefix + "kv").shape[0] == attention.kv.rows;
  check("kv", all_kv ? attention.kv.values : rows_at(attention.kv, positions));
  if (shape.ratio != 0) check("compressed", attention.compressed.values);
  check("attn_before_o", rows_at(attention.attn_before_o, positions));
  check("attn_out", attention.out.values);
  check("mlp_out", rows_at(layer.mlp_out, positions));
  Vector streams;
  for (int64_t t : positions) {
    streams.insert(streams.end(), layer.streams_out[t].values.begin(),
                   layer.streams_out[t].values.end());
  }
  check("streams_out", streams);

  if (shape.indexer()) {
    check("index_scores", attention.index_scores.values);
    const std::vector<int64_t> topk = golden.integers(prefix + "topk");
    const Matrix margin = golden.matrix(prefix + "topk_margin");
    const size_t width = topk.size() / attention.topk.size();
    for (size_t t = 0; t < attention.topk.size(); ++t) {
      if (margin.values[t] < kFirmMargin) continue;
      std::vector<int64_t> expected(topk.begin() + static_cast<std::ptrdiff_t>(t * width),
                                    topk.begin() + static_cast<std::ptrdiff_t>((t + 1) * width));
      std::erase(expected, -1);
      EXPECT_EQ(std::vector<int64_t>(attention.topk[t].begin(), attention.topk[t].end()), expected)
          << "position " << t;
    }
  }
  const std::vector<int64_t> ids = golden.integers(prefix + "expert_ids");
  const Matrix weights = golden.matrix(prefix + "expert_weights");
  Matrix margin;
  if (golden.has(prefix + "expert_margin")) margin = golden.matrix(prefix + "expert_margin");
  for (size_t t = 0; t < layer.routes.size(); ++t) {
    const Route& route = layer.routes[t];
    if (margin.rows != 0 && margin.values[t] < kFirmMargin) continue;
    for (size_t k = 0; k < route.ids.size(); ++k) {
      const size_t i = t * route.ids.size() + k;
      EXPECT_EQ(route.ids[k], ids[i]) << "position " << t;
      EXPECT_NEAR(route.weights[k], weights.values[i], kFraction) << "position " << t;
    }
  }
}

class GoldenModel : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenModel, EveryStageAgrees) {
  const Model model = load_model();
  const Tensors golden(kData + "layers_q_" + GetParam() + ".safetensors");
  const Tensors logits(kData + "logits_q.safetensors");
  const std::string name(GetParam());
  const std::vector<int64_t> positions = golden.integers("positions");
  const std::vector<int64_t> logit_positions = logits.integers(name + "/positions");
  const ModelTrace trace = model.forward(golden.integers("ids"), logit_positions, kExact);
  for (size_t i = 0; i < trace.layers.size(); ++i) {
    check_layer("layer" + std::to_string(i) + "/", golden, trace.layers[i], model.shape().layers[i],
                positions);
  }
  EXPECT_TRUE(close_to_largest("logits", trace.logits.values,
                               logits.matrix(name + "/logits").values, kFraction));
}

INSTANTIATE_TEST_SUITE_P(Texts, GoldenModel, ::testing::Values("text0129", "text0300"));

// Serving numerics have no stored results; what must hold is that they stay near the exact ones.
// The text is memorised, so the arg-max of every position is far ahead of the rest.
TEST(RoundedModel, KeepsFirmArgmaxes) {
  const Model model = load_model();
  const Tensors logits(kData + "logits_q.safetensors");
  const std::vector<int64_t> ids = logits.integers("text0129/ids");
  const std::vector<int64_t> positions = logits.integers("text0129/positions");
  const Matrix exact = logits.matrix("text0129/logits");
  for (const Roundings& roundings : {kServing, kReference}) {
    const ModelTrace trace = model.forward(ids, positions, roundings);
    int firm = 0;
    for (int64_t i = 0; i < exact.rows; ++i) {
      const auto expected = std::ranges::max_element(exact.row(i)) - exact.row(i).begin();
      Vector sorted(exact.row(i).begin(), exact.row(i).end());
      std::ranges::nth_element(sorted, sorted.begin() + 1, std::greater<>());
      // Rounded logits move by up to a fifth of the largest one (measured on this model); twice
      // that may change places.
      if (exact.row(i)[expected] - sorted[1] < 0.4 * std::abs(exact.row(i)[expected])) continue;
      ++firm;
      EXPECT_EQ(std::ranges::max_element(trace.logits.row(i)) - trace.logits.row(i).begin(),
                expected)
          << "position " << positions[i];
    }
    EXPECT_GE(firm, 4) << "too few firm positions to mean anything";
  }
}

}  // namespace
}  // namespace oracle
