// Random mixed steps: prefill and decode of several sequences in one batch, sequences that come, go
// and fork, every buffer between guard bytes and poisoned. At the end every token's output must
// have the bits that the sequence gets when it is computed alone, in other chunks.
// DSV4_SOAK_SECONDS sets the time per case (default 2).
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "tests/attention/layer_harness.h"
#include "tests/testing/guarded_device.h"
#include "tests/testing/random.h"

namespace dsv4::testing {
namespace {

constexpr int kSeqs = 6, kMaxTokens = 160;
constexpr int64_t kMaxContext = 700;

double soak_seconds() {
  const char* text = std::getenv("DSV4_SOAK_SECONDS");
  return text == nullptr ? 2.0 : std::atof(text);
}

struct Live {
  SequenceId id;
  std::vector<float> hidden, out;  // [tokens, hidden_size]
};

class Soak : public ::testing::TestWithParam<std::tuple<LayerTarget, int>> {};

TEST_P(Soak, EveryTokenHasTheBitsOfItsOwnSequence) {
  const auto& [target, ratio] = GetParam();
  if (const std::string reason = target.why_not(); !reason.empty()) {
    GTEST_SKIP() << target.backend << ": " << reason;
  }
  Numerics numerics = kServing;
  numerics.kv = target.descriptor().native_format;
  const ModelConfig config = small_config(8, 2);
  const StepLimits limits{kMaxTokens, kSeqs, kMaxContext};
  auto guarded = std::make_unique<GuardedDevice>(
      open_device(DeviceId::parse(target.device), LayerHarness::kThreads));
  GuardedDevice& guards = *guarded;
  LayerHarness mixed(config, ratio, numerics, limits, {}, target, std::move(guarded));
  LayerHarness alone(config, ratio, numerics, limits, {}, target);
  const int64_t width = config.hidden_size;

  Random random(77 + static_cast<uint64_t>(ratio));
  std::vector<Live> live;
  int64_t steps = 0, checked = 0;
  const auto check = [&](const Live& sequence) {
    const SequenceId id = alone.pool().create().value();
    std::vector<float> expected;
    for (size_t done = 0; done < sequence.hidden.size();) {
      const auto left = static_cast<int64_t>((sequence.hidden.size() - done)) / width;
      const auto count = std::min<int64_t>(left, 1 + static_cast<int64_t>(random.below(150)));
      const auto begin = sequence.hidden.begin() + static_cast<int64_t>(done);
      const std::vector<float> rows = alone.forward(id, {begin, begin + count * width});
      expected.insert(expected.end(), rows.begin(), rows.end());
      done += static_cast<size_t>(count * width);
    }
    alone.pool().release(id);
    ASSERT_EQ(expected.size(), sequence.out.size());
    EXPECT_EQ(std::memcmp(expected.data(), sequence.out.data(), expected.size() * sizeof(float)), 0)
        << "a sequence of " << expected.size() / static_cast<size_t>(width) << " tokens, after "
        << steps << " steps";
    ++checked;
  };

  const auto begin = std::chrono::steady_clock::now();
  const double seconds = soak_seconds();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() <
             seconds ||
         steps < 20) {
    // Come, fork, go.
    while (live.empty() || (static_cast<int>(live.size()) < kSeqs && random.below(4) == 0)) {
      if (!live.empty() && random.below(3) == 0) {
        const Live& parent = live[random.below(live.size())];
        const int64_t length = mixed.pool().length(parent.id);
        const std::optional<SequenceId> fork = mixed.pool().fork(parent.id, length);
        if (!fork.has_value()) break;
        Live copy{*fork, parent.hidden, parent.out};
        live.push_back(std::move(copy));
      } else {
        const std::optional<SequenceId> id = mixed.pool().create();
        if (!id.has_value()) break;
        live.push_back({*id, {}, {}});
      }
    }
    // A batch in random order.
    std::vector<BatchEntry> batch;
    std::vector<size_t> members;
    std::vector<float> hidden;
    int64_t room = kMaxTokens;
    const std::vector<int32_t> order = random.permutation(static_cast<int>(live.size()));
    for (int32_t i : order) {
      Live& sequence = live[static_cast<size_t>(i)];
      const int64_t length = mixed.pool().length(sequence.id);
      int64_t count = random.below(5) < 3 ? 1 : 1 + static_cast<int64_t>(random.below(90));
      count = std::min({count, room, kMaxContext - length});
      if (count < 1 || random.below(6) == 0) continue;
      const std::vector<float> rows = formula_hidden(count, width, random.below(1 << 30));
      sequence.hidden.insert(sequence.hidden.end(), rows.begin(), rows.end());
      hidden.insert(hidden.end(), rows.begin(), rows.end());
      batch.push_back({sequence.id, static_cast<int32_t>(count)});
      members.push_back(static_cast<size_t>(i));
      room -= count;
    }
    if (!batch.empty()) {
      const std::vector<float> out = mixed.forward(batch, hidden);
      auto row = out.begin();
      for (size_t i = 0; i < batch.size(); ++i) {
        const auto end = row + batch[i].num_tokens * width;
        std::vector<float>& all = live[members[i]].out;
        all.insert(all.end(), row, end);
        row = end;
      }
      for (float value : out) ASSERT_TRUE(std::isfinite(value)) << "step " << steps;
      ++steps;
    }
    // Finished sequences go; some are checked.
    for (size_t i = live.size(); i-- > 0;) {
      if (mixed.pool().length(live[i].id) < kMaxContext && random.below(60) != 0) continue;
      if (random.below(4) == 0) check(live[i]);
      mixed.pool().release(live[i].id);
      live.erase(live.begin() + static_cast<int64_t>(i));
    }
  }
  for (const Live& sequence : live) check(sequence);
  EXPECT_TRUE(guards.guards_intact());
  printf("%s ratio %d: %lld steps, %lld sequences checked\n", target.backend.c_str(), ratio,
         static_cast<long long>(steps), static_cast<long long>(checked));
}

INSTANTIATE_TEST_SUITE_P(Targets, Soak,
                         ::testing::Combine(::testing::ValuesIn(layer_targets()),
                                            ::testing::Values(0, 4, 128)),
                         [](const auto& info) {
                           return std::get<0>(info.param).label() + "_" +
                                  std::to_string(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace dsv4::testing
