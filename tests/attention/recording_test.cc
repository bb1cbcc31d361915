// A step recorded once (one CUDA graph) replays with new lengths, slots and inputs: same bits as
// steps that run one by one. Those are watched, so that their parts run in order, while recorded
// ones have branches where the device can.
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tests/attention/layer_harness.h"

namespace dsv4::testing {
namespace {

class Watch final : public StepObserver {
 public:
  void begin(std::string_view) override {}
  void end(std::string_view) override {}
};

/// A layer that runs every step, and one with the same weights that replays them.
class Recording : public ::testing::TestWithParam<std::tuple<LayerTarget, int, Products>> {
 protected:
  void SetUp() override {
    const auto& [target, ratio, products] = GetParam();
    if (const std::string reason = target.why_not(products); !reason.empty()) {
      GTEST_SKIP() << target.backend << ": " << reason;
    }
    auto device = open_device(DeviceId::parse(target.device), LayerHarness::kThreads);
    if (!device->can_record()) GTEST_SKIP() << target.device << " records nothing";
    if (products == Products::kFp8 && !device->ops().takes_e4m3)
      GTEST_SKIP() << target.device << " has no FP8 products";
    Numerics numerics = kServing;
    numerics.kv = target.descriptor().native_format;
    numerics.products = products;
    const StepLimits limits{250, 2, 600};
    numerics_ = numerics;
    eager_.emplace(config_, ratio, numerics, limits, TensorParallel{}, target);
    recorded_.emplace(config_, ratio, numerics, limits, TensorParallel{}, target);
  }
  static void expect_same(const std::vector<float>& a, const std::vector<float>& b,
                          const std::string& what) {
    ASSERT_EQ(a.size(), b.size());
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << what;
  }

  // Rows that FP8 products norm on their way, as V4's are.
  static ModelConfig config() {
    ModelConfig out = small_config(8, 2);
    out.q_lora_rank = 256;
    return out;
  }
  const ModelConfig config_ = config();
  Numerics numerics_;
  std::optional<LayerHarness> eager_, recorded_;
};

TEST_P(Recording, ReplaysWithNewLengths) {
  // Two sequences take turns: the recorded step must follow the plan to other blocks and slots.
  // The second prompt ends where the indexer begins to leave entries out (position 259).
  const int64_t prompts[] = {250, 120};
  SequenceId eager_ids[2], recorded_ids[2];
  Watch watch;
  const ForwardOptions in_order{nullptr, &watch};
  for (int s = 0; s < 2; ++s) {
    eager_ids[s] = eager_->pool().create().value();
    recorded_ids[s] = recorded_->pool().create().value();
    const std::vector<float> hidden = formula_hidden(prompts[s], config_.hidden_size, 21 + s);
    expect_same(recorded_->forward_recorded(recorded_ids[s], hidden),
                eager_->forward(eager_ids[s], hidden, in_order), "prompt");
  }
  for (int step = 0; step < 40; ++step) {
    const int s = step % 2;
    const std::vector<float> hidden = formula_hidden(1, config_.hidden_size, 100 + step);
    expect_same(recorded_->forward_recorded(recorded_ids[s], hidden),
                eager_->forward(eager_ids[s], hidden, in_order), "step " + std::to_string(step));
  }
}

// A token of each sequence in one recorded step; both complete entries of either ratio on the way.
TEST_P(Recording, ReplaysBatchesOfOneTokenEach) {
  const int64_t prompts[] = {250, 124};
  SequenceId eager_ids[2], recorded_ids[2];
  for (int s = 0; s < 2; ++s) {
    eager_ids[s] = eager_->pool().create().value();
    recorded_ids[s] = recorded_->pool().create().value();
    const std::vector<float> hidden = formula_hidden(prompts[s], config_.hidden_size, 31 + s);
    eager_->forward(eager_ids[s], hidden);
    recorded_->forward(recorded_ids[s], hidden);
  }
  const BatchEntry batch[] = {{recorded_ids[0], 1}, {recorded_ids[1], 1}};
  for (int step = 0; step < 12; ++step) {
    std::vector<float> hidden, expected;
    for (int s = 0; s < 2; ++s) {
      const std::vector<float> row = formula_hidden(1, config_.hidden_size, 200 + 2 * step + s);
      const std::vector<float> out = eager_->forward(eager_ids[s], row);
      hidden.insert(hidden.end(), row.begin(), row.end());
      expected.insert(expected.end(), out.begin(), out.end());
    }
    expect_same(recorded_->forward_recorded(batch, hidden), expected,
                "step " + std::to_string(step));
  }
}

// So many tokens and heads that attention norms queries itself, where it can, and makes wo_a's
// codes; then a token that reads what the prompt has left.
TEST_P(Recording, PromptsOfManyTokens) {
  const auto& [target, ratio, products] = GetParam();
  constexpr int kTokens = 528;
  ModelConfig config = config_;
  config.num_heads = 64;
  const StepLimits limits{kTokens, 1, 600};
  LayerHarness watched(config, ratio, numerics_, limits, TensorParallel{}, target);
  LayerHarness branched(config, ratio, numerics_, limits, TensorParallel{}, target);
  const SequenceId watched_id = watched.pool().create().value();
  const SequenceId branched_id = branched.pool().create().value();
  Watch watch;
  for (const int tokens : {kTokens, 1}) {
    const std::vector<float> hidden = formula_hidden(tokens, config.hidden_size, 40 + tokens);
    expect_same(branched.forward(branched_id, hidden),
                watched.forward(watched_id, hidden, {nullptr, &watch}),
                std::to_string(tokens) + " tokens");
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, Recording,
                         ::testing::Combine(::testing::ValuesIn(layer_targets()),
                                            ::testing::Values(0, 4, 128),
                                            ::testing::Values(Products::kF32, Products::kFp8)),
                         [](const auto& info) {
                           return std::get<0>(info.param).label() + "_" +
                                  std::to_string(std::get<1>(info.param)) +
                                  (std::get<2>(info.param) == Products::kFp8 ? "_fp8" : "");
                         });

}  // namespace
}  // namespace dsv4::testing
