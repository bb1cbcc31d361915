// The layer itself: tensor parallelism, head counts, refusals, workspace.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/attention/layer_harness.h"

namespace dsv4 {
namespace {

using testing::formula_hidden;
using testing::layer_targets;
using testing::LayerHarness;
using testing::LayerTarget;
using testing::small_config;

// Outputs of 2 and 4 ranks add up to the whole. In `exact` only the order of the f32 sums over
// heads' columns of wo_b differs: K = o_groups * o_lora_rank products, each sum of magnitude <= sum
// |z| |w|; measured sums stay below 8, so the bound is K * 2^-24 * 8, rounded up to 1e-4 of the
// largest output.
TEST(TensorParallel, RanksAddUp) {
  for (int ratio : {0, 4, 128}) {
    const ModelConfig config = small_config(8, 4);
    const int64_t tokens = 300;
    const std::vector<float> hidden = formula_hidden(tokens, config.hidden_size, 1);
    const StepLimits limits{300, 1, 300};
    LayerHarness whole(config, ratio, kExact, limits);
    const std::vector<float> expected = whole.forward(whole.pool().create().value(), hidden);
    float largest = 0;
    for (float value : expected) largest = std::max(largest, std::fabs(value));
    for (int size : {2, 4}) {
      std::vector<float> sum(expected.size());
      for (int rank = 0; rank < size; ++rank) {
        LayerHarness part(config, ratio, kExact, limits, {rank, size});
        const std::vector<float> out = part.forward(part.pool().create().value(), hidden);
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += out[i];
      }
      for (size_t i = 0; i < sum.size(); ++i) {
        ASSERT_NEAR(sum[i], expected[i], 1e-4f * largest)
            << "ratio " << ratio << ", " << size << " ranks, element " << i;
      }
    }
  }
}

// In `serving` a rank's part is rounded to bf16 (2^-9 relative), and nothing else differs: groups
// are quantised alone.
TEST(TensorParallel, RanksAddUpInServing) {
  const ModelConfig config = small_config(8, 4);
  const std::vector<float> hidden = formula_hidden(270, config.hidden_size, 2);
  const StepLimits limits{270, 1, 270};
  LayerHarness whole(config, 4, kServing, limits);
  const std::vector<float> expected = whole.forward(whole.pool().create().value(), hidden);
  std::vector<float> sum(expected.size()), magnitude(expected.size());
  for (int rank = 0; rank < 4; ++rank) {
    LayerHarness part(config, 4, kServing, limits, {rank, 4});
    const std::vector<float> out = part.forward(part.pool().create().value(), hidden);
    for (size_t i = 0; i < sum.size(); ++i) {
      sum[i] += out[i];
      magnitude[i] += std::fabs(out[i]);
    }
  }
  for (size_t i = 0; i < sum.size(); ++i) {
    ASSERT_NEAR(sum[i], expected[i], 0x1p-8f * (magnitude[i] + std::fabs(expected[i])) + 1e-5f)
        << "element " << i;
  }
}

TEST(TensorParallel, RefusesWhatDoesNotDivide) {
  EXPECT_THROW(LayerHarness(small_config(6, 2), 0, kServing, {4, 1, 4}, {0, 4}), Error);
  EXPECT_THROW(LayerHarness(small_config(8, 2), 0, kServing, {4, 1, 4}, {0, 4}), Error);
  EXPECT_THROW(LayerHarness(small_config(8, 4), 0, kServing, {4, 1, 4}, {4, 4}), Error);
}

// Every head count works without padding, all kinds; a head's output does not depend on how many
// others there are.
TEST(Heads, AnyCount) {
  for (const LayerTarget& target : layer_targets()) {
    if (!target.why_not().empty()) continue;
    Numerics numerics = kServing;
    numerics.kv = target.descriptor().native_format;
    for (int heads : {1, 2, 3, 7, 16, 33, 64, 128}) {
      for (int ratio : {0, 4, 128}) {
        const ModelConfig config = small_config(heads, 1);
        LayerHarness harness(config, ratio, numerics, {140, 1, 140}, {}, target);
        const std::vector<float> out = harness.forward(harness.pool().create().value(),
                                                       formula_hidden(140, config.hidden_size, 3));
        for (float value : out)
          ASSERT_TRUE(std::isfinite(value))
              << target.backend << ", " << heads << " heads, ratio " << ratio;
      }
    }
  }
}

// A tap sees every score of the indexer, and a step without one may leave out those that are not
// chosen (IndexLogitsParams::best): long contexts with few chosen.
TEST(Layer, ScoresThatNobodySeesDoNotMatter) {
  class Ignore final : public TapSink {
    void tap(std::string_view, const ConstTensor&) override {}
  };
  for (const LayerTarget& target : layer_targets()) {
    if (!target.why_not().empty()) continue;
    Numerics numerics = kServing;
    numerics.kv = target.descriptor().native_format;
    ModelConfig config = small_config(8, 4);
    config.index_topk = 4;
    LayerHarness harness(config, 4, numerics, {1300, 2, 1300}, {}, target);
    const std::vector<float> hidden = formula_hidden(1300, config.hidden_size, 8);
    Ignore taps;
    ForwardOptions watched;
    watched.taps = &taps;
    const std::vector<float> expected =
        harness.forward(harness.pool().create().value(), hidden, watched);
    EXPECT_EQ(harness.forward(harness.pool().create().value(), hidden), expected) << target.backend;
  }
}

TEST(Layer, DuplicateNamesAreRefused) {
  const ModelConfig config = small_config(4, 2);
  LayerHarness harness(config, 0, kServing, {4, 1, 4});
  std::set<std::string> names;
  const LayerKind kind = harness.layer().kind();
  const auto source =
      formula_source(expected_attention_tensors(config, kind, "a."), 1, FormulaStorage::kReleased);
  const AttentionWeights weights = bind_attention(*source, config, kind, "a.");
  AttentionArgs args;
  args.config = &config;
  args.kind = kind;
  args.name = "layers.0.attn";
  args.weights = &weights;
  args.device = &harness.device();
  args.names = &names;
  const AttentionDescriptor& descriptor = harness.layer().descriptor();
  const auto first = create_attention(descriptor, args);
  try {
    create_attention(descriptor, args);
    FAIL() << "the second layer of a name must be refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("duplicate layer"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("layers.0.attn"), std::string::npos);
  }
}

TEST(Layer, RefusesTensorsThatDoNotFit) {
  LayerHarness harness(small_config(4, 2), 4, kServing, {8, 1, 8});
  const int64_t hidden = harness.config().hidden_size;
  const SequenceId sequence = harness.pool().create().value();
  const BatchEntry entry{sequence, 3};
  ASSERT_TRUE(harness.pool().reserve(sequence, 3));
  harness.plan().update({&entry, 1}, harness.pool(), {});
  std::vector<Bf16> in(static_cast<size_t>(8 * hidden)), out(in.size());
  const auto try_forward = [&](const ConstTensor& x, const Tensor& y,
                               const LayerCaches& caches) -> std::string {
    try {
      harness.layer().forward(harness.plan(), caches, x, y,
                              {harness.workspace().data(), harness.workspace().bytes()}, {});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const ConstTensor x(in.data(), DType::kBf16, {3, hidden});
  const Tensor y(out.data(), DType::kBf16, {3, hidden});
  const LayerCaches caches = harness.pool().caches(0);
  EXPECT_EQ(try_forward(x, y, caches), "");
  EXPECT_NE(
      try_forward(ConstTensor(in.data(), DType::kBf16, {4, hidden}), y, caches).find("hidden"),
      std::string::npos);
  EXPECT_NE(try_forward(x, Tensor(out.data(), DType::kF32, {3, hidden}), caches).find("out"),
            std::string::npos);
  EXPECT_NE(try_forward(x, Tensor(out.data(), DType::kBf16, {3, hidden - 1}), caches).find("out"),
            std::string::npos);
  LayerCaches broken = caches;
  broken.index = {};
  EXPECT_NE(try_forward(x, y, broken).find("index cache"), std::string::npos);
  broken = caches;
  broken.window.format = KvFormat::kBf16;
  EXPECT_NE(try_forward(x, y, broken).find("window cache"), std::string::npos);
  broken = caches;
  broken.state.ring_rows = 4;
  EXPECT_NE(try_forward(x, y, broken).find("compressor state"), std::string::npos);
  // A workspace below what workspace_bytes asked for is named with both sizes.
  try {
    harness.layer().forward(harness.plan(), caches, x, y, {harness.workspace().data(), 4096}, {});
    FAIL() << "a small workspace must be refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("4096"), std::string::npos);
  }
}

TEST(StepPlan, RefusesBatchesBeyondItsLimits) {
  LayerHarness harness(small_config(4, 2), 4, kServing, {8, 2, 20});
  KvCachePool& pool = harness.pool();
  const SequenceId a = pool.create().value(), b = pool.create().value();
  ASSERT_TRUE(pool.reserve(a, 8));
  ASSERT_TRUE(pool.reserve(b, 8));
  const auto try_update = [&](std::vector<BatchEntry> batch) -> std::string {
    try {
      harness.plan().update(batch, pool, {});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(try_update({{a, 4}, {b, 4}}), "");
  EXPECT_NE(try_update({{a, 5}, {b, 4}}).find("9 tokens"), std::string::npos);
  EXPECT_NE(try_update({{a, 0}}).find("0 new tokens"), std::string::npos);
  EXPECT_NE(try_update({{a, 1}, {a, 1}}).find("twice"), std::string::npos);
  EXPECT_NE(try_update({{12345, 1}}), "");
  EXPECT_EQ(harness.plan().view().num_tokens, 8) << "a refused batch leaves the plan as it was";
}

// Recorded work fits every later batch of the same kind: of one token a sequence, or of any.
TEST(StepPlan, RecordingsOfOneTokenEachStayThat) {
  LayerHarness harness(small_config(4, 2), 4, kServing, {8, 3, 20});
  KvCachePool& pool = harness.pool();
  const SequenceId a = pool.create().value(), b = pool.create().value();
  ASSERT_TRUE(pool.reserve(a, 2));
  ASSERT_TRUE(pool.reserve(b, 2));
  const BatchEntry one_each[] = {{a, 1}, {b, 1}}, uneven[] = {{a, 2}, {b, 1}};
  const auto longest = [&](std::span<const BatchEntry> batch) {
    harness.plan().update(batch, pool, {}, 0, true);
    return harness.plan().view().max_query_len;
  };
  EXPECT_EQ(longest(one_each), 1);
  EXPECT_EQ(longest(uneven), 3) << "another batch of three tokens may be of one sequence";
}

// Padding tokens (slot -1) write nothing, see nothing, and give an output of zero rows of
// attention.
TEST(StepPlan, PaddingTokensAreInert) {
  LayerHarness harness(small_config(4, 2), 4, kServing, {8, 1, 20});
  KvCachePool& pool = harness.pool();
  const SequenceId sequence = pool.create().value();
  const BatchEntry entry{sequence, 5};
  ASSERT_TRUE(pool.reserve(sequence, 5));
  harness.plan().update({&entry, 1}, pool, {}, 8);
  const PlanView& view = harness.plan().view();
  ASSERT_EQ(view.num_tokens, 8);
  for (int t = 5; t < 8; ++t) {
    EXPECT_EQ(view.window_slot_mapping[t], -1);
    EXPECT_EQ(view.window_begin[t], view.window_end[t]);
    EXPECT_EQ(view.ratio(4)->slot_mapping[t], -1);
    EXPECT_EQ(view.ratio(4)->end[t], 0);
  }
  const std::vector<float> hidden = formula_hidden(8, harness.config().hidden_size, 4);
  std::vector<Bf16> in(hidden.begin(), hidden.end()), padded(in.size()), plain(in.size());
  const auto forward = [&](std::vector<Bf16>& out, int64_t tokens) {
    harness.layer().forward(
        harness.plan(), pool.caches(0),
        ConstTensor(in.data(), DType::kBf16, {tokens, harness.config().hidden_size}),
        Tensor(out.data(), DType::kBf16, {tokens, harness.config().hidden_size}),
        {harness.workspace().data(), harness.workspace().bytes()}, {});
  };
  forward(padded, 8);
  harness.plan().update({&entry, 1}, pool, {});
  forward(plain, 5);
  for (int64_t i = 0; i < 5 * harness.config().hidden_size; ++i) {
    ASSERT_EQ(padded[static_cast<size_t>(i)].bits, plain[static_cast<size_t>(i)].bits) << i;
  }
}

}  // namespace
}  // namespace dsv4
