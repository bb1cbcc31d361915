// AMD's layer on the executor: a token's bits depend on its own sequence only, whatever the chunks,
// the batch around it and the lists that are flattened together.
#include <gtest/gtest.h>

#include "tests/attention/layer_harness.h"

namespace dsv4::testing {
namespace {

class EmulatedInvariance : public ::testing::TestWithParam<int> {};

TEST_P(EmulatedInvariance, BatchAndChunksChangeNoBit) {
  ModelConfig config = small_config(4, 2);
  config.index_topk = 16;  // leaves entries out from position 67 on
  Numerics numerics = kServing;
  numerics.wo_a = WoA::kBf16;
  const StepLimits limits{140, 2, 140};
  constexpr int64_t kTokens = 132;
  const auto width = static_cast<int64_t>(config.hidden_size);
  const std::vector<float> own = formula_hidden(kTokens, width, 5);
  const std::vector<float> other = formula_hidden(kTokens, width, 6);

  LayerHarness alone(config, GetParam(), numerics, limits, {}, emulated_target());
  const std::vector<float> expected = alone.forward(alone.pool().create().value(), own);

  LayerHarness mixed(config, GetParam(), numerics, limits, {}, emulated_target());
  const SequenceId a = mixed.pool().create().value(), b = mixed.pool().create().value();
  struct Step {
    int32_t own, other;
    bool own_first;
  };
  std::vector<float> actual;
  int64_t done = 0, other_done = 0;
  for (const Step& step : {Step{70, 33, false},
                           {0, 61, true},
                           {53, 1, true},
                           {1, 1, false},
                           {4, 0, true},
                           {4, 7, false}}) {
    const auto rows = [&](const std::vector<float>& of, int64_t begin, int64_t count) {
      return std::vector<float>(of.begin() + begin * width, of.begin() + (begin + count) * width);
    };
    std::vector<BatchEntry> batch;
    std::vector<float> hidden;
    const auto add = [&](SequenceId sequence, const std::vector<float>& of, int64_t& at,
                         int32_t count) {
      if (count == 0) return;
      batch.push_back({sequence, count});
      const std::vector<float> more = rows(of, at, count);
      hidden.insert(hidden.end(), more.begin(), more.end());
      at += count;
    };
    if (step.own_first) add(a, own, done, step.own);
    add(b, other, other_done, step.other);
    if (!step.own_first) add(a, own, done, step.own);
    const std::vector<float> out = mixed.forward(batch, hidden);
    const std::vector<float> part = rows(out, step.own_first ? 0 : step.other, step.own);
    actual.insert(actual.end(), part.begin(), part.end());
  }
  ASSERT_EQ(done, kTokens);
  EXPECT_TRUE(actual == expected);
}

INSTANTIATE_TEST_SUITE_P(Ratios, EmulatedInvariance, ::testing::Values(0, 4, 128));

}  // namespace
}  // namespace dsv4::testing
