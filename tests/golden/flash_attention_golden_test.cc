// One attention layer of each kind in V4-Flash geometry (hidden 4096, 64 heads, top-k 512), weights
// and inputs by the manifest's formula, `exact` numerics, against vectors of an independent
// implementation.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "dsv4/single_layer.h"
#include "tests/golden/golden_files.h"

namespace dsv4 {
namespace {

using golden::data_path;
using golden::ints;

constexpr double kRelative = 1e-4;  // of the largest value of the tensor; the bound
constexpr uint64_t kSeed = 1;

class FlashAttention : public testing::TestWithParam<const char*> {};

TEST_P(FlashAttention, AgreesWithGolden) {
  const SafetensorsFile file(data_path("flash_attention.safetensors"));
  const std::string kind_name = GetParam();
  const ModelConfig config =
      ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/configs/v4-flash.json");
  const LayerKind kind = layer_kind_of(config, kind_name);
  constexpr int kChunk = 512;
  EngineOptions options;
  options.numerics = kExact;
  options.limits = {kChunk, 1, 2600};
  const auto layer =
      SingleLayer::create(config, kind,
                          formula_source(expected_attention_tensors(config, kind, kind_name + "."),
                                         kSeed, FormulaStorage::kBf16Values),
                          kind_name + ".", options);
  for (int64_t length : {1, 200, 700, 2600}) {
    char digits[8];
    snprintf(digits, sizeof(digits), "%04d", static_cast<int>(length));
    const std::string prefix = kind_name + "/len" + digits + "/";
    SCOPED_TRACE(prefix);
    std::vector<float> hidden(static_cast<size_t>(length * config.hidden_size));
    const uint64_t key = formula_key("x." + std::to_string(length), kSeed);
    for (size_t i = 0; i < hidden.size(); ++i) {
      hidden[i] = round_bf16(static_cast<float>(1.75 * formula_uniform(key, i)));
    }
    golden::KeptTaps taps;
    const SequenceId sequence = layer->pool().create().value();
    for (int64_t done = 0; done < length;) {
      const int64_t count = std::min<int64_t>(kChunk, length - done);
      const BatchEntry entry{sequence, static_cast<int32_t>(count)};
      std::vector<float> out(static_cast<size_t>(count * config.hidden_size));
      layer->forward({&entry, 1},
                     ConstTensor(hidden.data() + done * config.hidden_size, DType::kF32,
                                 {count, config.hidden_size}),
                     Tensor(out.data(), DType::kF32, {count, config.hidden_size}),
                     {&taps, nullptr});
      done += count;
    }
    layer->pool().release(sequence);

    const std::vector<int32_t> positions = ints(file, prefix + "positions");
    for (const char* what : {"attn_out", "kv", "q", "attn_before_o"}) {
      if (!golden::has(file, prefix + what)) continue;
      const ConstTensor golden = file.get(prefix + what);
      const double bound = kRelative * golden::largest(golden);
      // q and attn_before_o are stored at the last position only.
      const size_t skip = positions.size() - static_cast<size_t>(golden.shape[0]);
      for (int64_t r = 0; r < golden.shape[0]; ++r) {
        const auto position = static_cast<size_t>(positions[skip + static_cast<size_t>(r)]);
        golden::expect_row_near(golden, r, taps.at(what).f32[position], bound, what);
      }
    }
    if (golden::has(file, prefix + "compressed")) {
      const ConstTensor golden = file.get(prefix + "compressed");
      const std::vector<int32_t> entries = ints(file, prefix + "entries");
      for (size_t r = 0; r < entries.size(); ++r) {
        golden::expect_row_near(golden, static_cast<int64_t>(r),
                                taps.at("compressed").f32[static_cast<size_t>(entries[r])],
                                kRelative * golden::largest(golden), "compressed");
      }
    }
    if (!golden::has(file, prefix + "topk")) continue;
    const ConstTensor topk = file.get(prefix + "topk"), margin = file.get(prefix + "topk_margin");
    const ConstTensor scores = file.get(prefix + "index_scores");
    const double bound = kRelative * golden::largest(scores);
    for (size_t r = 0; r < positions.size(); ++r) {
      const auto position = static_cast<size_t>(positions[r]);
      for (int32_t j = 0; j < (positions[r] + 1) / 4; ++j) {
        EXPECT_NEAR(taps.at("index_scores").f32[position][static_cast<size_t>(j)],
                    scores.as<float>()[static_cast<int64_t>(r) * scores.shape[1] + j], bound)
            << "position " << position << " entry " << j;
      }
      if (margin.as<float>()[r] <= 1e-5f) continue;
      const int32_t* row = topk.as<int32_t>() + static_cast<int64_t>(r) * topk.shape[1];
      std::set<int32_t> expected(row, row + topk.shape[1]);
      const std::vector<int32_t>& got = taps.at("topk").i32[position];
      std::set<int32_t> actual(got.begin(), got.end());
      expected.erase(-1);
      actual.erase(-1);
      EXPECT_EQ(actual, expected) << "position " << position;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Kinds, FlashAttention, testing::Values("sliding", "csa", "hca"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace dsv4
