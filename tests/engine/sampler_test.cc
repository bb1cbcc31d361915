#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

SamplingOptions options(double temperature, int top_k = 0, double top_p = 1, uint64_t seed = 1) {
  SamplingOptions out;
  out.temperature = temperature;
  out.top_k = top_k;
  out.top_p = top_p;
  out.seed = seed;
  return out;
}

int32_t greedy(const std::vector<float>& logits) {
  return Sampler(options(0)).draw(logits, 0, 0);
}

std::map<int32_t, int> histogram(const Sampler& sampler, const std::vector<float>& logits, int n) {
  std::map<int32_t, int> out;
  for (int i = 0; i < n; ++i) ++out[sampler.draw(logits, 0, i)];
  return out;
}

// Six standard deviations of a binomial count: a right sampler misses it once in 10^9.
double bound(double probability, int n) {
  return 6 * std::sqrt(n * probability * (1 - probability)) + 1;
}

// ---- the generator

TEST(UniformAt, IsStable) {
  // From a second implementation in unbounded integers.
  EXPECT_EQ(uniform_at(0, 0, 0), 0x4704eb7871f97p-53);
  EXPECT_EQ(uniform_at(1, 0, 0), 0x1631405e8db1b0p-53);
  EXPECT_EQ(uniform_at(0, 1, 0), 0x89cb7302018cfp-53);
  EXPECT_EQ(uniform_at(0, 0, 1), 0x5e654f092d8cfp-53);
  EXPECT_EQ(uniform_at(42, 7, 1000), 0x5fe4c7a13c6fcp-53);
  EXPECT_EQ(uniform_at(UINT64_MAX, UINT64_MAX, UINT64_MAX), 0xb2b62fe90f81cp-53);
}

TEST(UniformAt, FillsTheIntervalAlongEveryKey) {
  constexpr int kDraws = 100000;
  constexpr int kBins = 64;
  for (int key = 0; key < 3; ++key) {
    std::vector<int> bins(kBins);
    double product = 0, previous = 0.5;
    for (uint64_t i = 0; i < kDraws; ++i) {
      const double u = uniform_at(key == 0 ? i : 3, key == 1 ? i : 3, key == 2 ? i : 3);
      ASSERT_GE(u, 0);
      ASSERT_LT(u, 1);
      ++bins[static_cast<size_t>(u * kBins)];
      product += (u - 0.5) * (previous - 0.5);
      previous = u;
    }
    for (const int count : bins) EXPECT_NEAR(count, kDraws / kBins, bound(1.0 / kBins, kDraws));
    // Neighbours are uncorrelated: each product has variance 1/144.
    EXPECT_LT(std::abs(product), 6 * std::sqrt(kDraws / 144.0));
  }
}

// ---- greedy

TEST(Sampler, GreedyTakesTheLargestAndTheSmallestIdOfEquals) {
  EXPECT_EQ(greedy({1, 3, 2}), 1);
  EXPECT_EQ(greedy({1, 3, 3, 3}), 1);
  EXPECT_EQ(greedy({-kInf, -5, -kInf}), 1);
  EXPECT_EQ(greedy({0.0f, -0.0f}), 0);
  EXPECT_EQ(greedy({-0.0f, 0.0f}), 0);
  EXPECT_EQ(greedy({7}), 0);
}

TEST(Sampler, NaNCountsAsNothing) {
  EXPECT_EQ(greedy({kNaN, 1, kNaN, 2, kNaN}), 3);
  const Sampler sampler(options(1));
  for (const auto& [id, count] : histogram(sampler, {kNaN, 1, kNaN, 2, -kInf}, 500)) {
    EXPECT_TRUE(id == 1 || id == 3) << id << " drawn " << count << " times";
  }
}

TEST(Sampler, InfinityExcludesAllFiniteLogits) {
  EXPECT_EQ(greedy({1, kInf, kInf}), 1);
  const std::map<int32_t, int> counts = histogram(Sampler(options(1)), {1, kInf, 5, kInf}, 4000);
  ASSERT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts.at(1), 2000, bound(0.5, 4000));
  EXPECT_EQ(counts.count(3), 1u);
}

TEST(Sampler, RefusesLogitsWithoutAChoice) {
  for (const double temperature : {0.0, 1.0}) {
    const Sampler sampler(options(temperature));
    const std::vector<float> nothing = {kNaN, -kInf, kNaN};
    try {
      sampler.draw(nothing, 0, 17);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInternal);
      EXPECT_NE(std::string(error.what()).find("position 17"), std::string::npos) << error.what();
    }
    EXPECT_THROW(sampler.draw({}, 0, 0), Error);
  }
}

// ---- probabilities

TEST(Sampler, FrequenciesAreThoseOfTheSoftmax) {
  constexpr int kDraws = 40000;
  const std::vector<float> logits = {1, 0, 2, -1, 2, 0.5f};
  for (const double temperature : {0.5, 1.0, 3.0}) {
    double total = 0;
    for (const float logit : logits) total += std::exp(logit / temperature);
    std::map<int32_t, int> counts = histogram(Sampler(options(temperature)), logits, kDraws);
    for (size_t id = 0; id < logits.size(); ++id) {
      const double p = std::exp(logits[id] / temperature) / total;
      EXPECT_NEAR(counts[static_cast<int32_t>(id)], p * kDraws, bound(p, kDraws))
          << "id " << id << ", temperature " << temperature;
    }
  }
}

TEST(Sampler, ExtremeTemperatures) {
  const std::vector<float> logits = {1, 1.001f, -3e38f, 3e38f, 2};
  EXPECT_EQ(histogram(Sampler(options(5e-324)), logits, 100).size(), 1u);
  EXPECT_EQ(histogram(Sampler(options(5e-324)), logits, 100).begin()->first, 3);
  EXPECT_EQ(histogram(Sampler(options(1e308)), logits, 1000).size(), logits.size());
}

TEST(Sampler, TopKKeepsTheFirstByLogitThenId) {
  const std::vector<float> logits = {1, 2, 2, 2, 0};
  std::map<int32_t, int> counts = histogram(Sampler(options(1, 2)), logits, 2000);
  ASSERT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts[1], 1000, bound(0.5, 2000));
  EXPECT_NEAR(counts[2], 1000, bound(0.5, 2000));
  EXPECT_EQ(histogram(Sampler(options(1, 1)), logits, 50).begin()->first, 1);
  EXPECT_EQ(histogram(Sampler(options(1, 100)), logits, 2000).size(), 5u);
}

TEST(Sampler, TopPKeepsTheShortestBeginning) {
  // Probabilities 1/2, 1/4, 1/8, 1/8.
  const float ln2 = static_cast<float>(std::log(2.0));
  const std::vector<float> logits = {-ln2 * 3, -ln2, -ln2 * 2, -ln2 * 3};
  EXPECT_EQ(histogram(Sampler(options(1, 0, 0.49)), logits, 500).size(), 1u);
  EXPECT_EQ(histogram(Sampler(options(1, 0, 0.51)), logits, 500).size(), 2u);
  std::map<int32_t, int> counts = histogram(Sampler(options(1, 0, 0.8)), logits, 4000);
  ASSERT_EQ(counts.size(), 3u);
  EXPECT_EQ(counts.count(3), 0u) << "of two equals the smaller id is kept";
  EXPECT_NEAR(counts[1], 4000 * 4.0 / 7, bound(4.0 / 7, 4000));
  // The share is of what top_k left: of {1/2, 1/4}, 2/3 lies with the first.
  EXPECT_EQ(histogram(Sampler(options(1, 2, 0.66)), logits, 500).size(), 1u);
  EXPECT_EQ(histogram(Sampler(options(1, 2, 0.68)), logits, 500).size(), 2u);
  EXPECT_EQ(histogram(Sampler(options(1, 0, 1e-300)), logits, 50).begin()->first, 1);
}

// The definition without lazy sorting.
int32_t draw_by_definition(const SamplingOptions& o, const std::vector<float>& logits,
                           uint64_t sequence, int64_t position) {
  std::vector<int32_t> ids(logits.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (o.top_k > 0) ids.resize(std::min(ids.size(), static_cast<size_t>(o.top_k)));
  const auto weight = [&](int32_t id) {
    return std::exp((double{logits[static_cast<size_t>(id)]} -
                     double{*std::max_element(logits.begin(), logits.end())}) /
                    o.temperature);
  };
  double total = 0;
  for (const int32_t id : ids) total += weight(id);
  double kept = 0;
  size_t count = 0;
  while (count < ids.size() && (count == 0 || kept < o.top_p * total)) kept += weight(ids[count++]);
  double left = uniform_at(o.seed, sequence, static_cast<uint64_t>(position)) * kept;
  for (size_t i = 0; i < count; ++i) {
    if (left < weight(ids[i])) return ids[i];
    left -= weight(ids[i]);
  }
  return ids[count - 1];
}

TEST(Sampler, AgreesWithTheDefinition) {
  std::mt19937 random(5);
  for (int round = 0; round < 40; ++round) {
    // Coarse values: many ties.
    std::vector<float> logits(1 + random() % 700);
    for (float& logit : logits) logit = static_cast<float>(random() % 64) / 8;
    const int top_k = round % 3 == 0 ? 0 : 1 + static_cast<int>(random() % 100);
    const double top_p = round % 2 == 0 ? 1 : 0.3 + 0.001 * (random() % 600);
    const SamplingOptions o = options(0.3 + 0.01 * (random() % 200), top_k, top_p, random());
    const Sampler sampler(o);
    for (int64_t position = 0; position < 20; ++position) {
      ASSERT_EQ(sampler.draw(logits, 3, position), draw_by_definition(o, logits, 3, position))
          << "round " << round << ", position " << position;
    }
  }
}

TEST(Sampler, DrawsDependOnTheirKeyOnly) {
  std::vector<float> logits(500);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(static_cast<float>(i));
  const Sampler one(options(1, 0, 0.9, 7));
  const Sampler other(options(1, 0, 0.9, 7));
  std::vector<int32_t> forward, backward, other_sequence, other_seed;
  for (int i = 0; i < 50; ++i) forward.push_back(one.draw(logits, 2, i));
  for (int i = 49; i >= 0; --i) backward.insert(backward.begin(), other.draw(logits, 2, i));
  for (int i = 0; i < 50; ++i) {
    other_sequence.push_back(one.draw(logits, 3, i));
    other_seed.push_back(Sampler(options(1, 0, 0.9, 8)).draw(logits, 2, i));
  }
  EXPECT_EQ(forward, backward);
  EXPECT_NE(forward, other_sequence);
  EXPECT_NE(forward, other_seed);
}

TEST(Sampler, RefusesWrongOptions) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  struct Wrong {
    SamplingOptions options;
    std::string name;
  };
  const std::vector<Wrong> all = {
      {options(nan), "temperature"}, {options(-0.1), "temperature"}, {options(inf), "temperature"},
      {options(1, -1), "top_k"},     {options(1, 0, 0), "top_p"},    {options(1, 0, 1.01), "top_p"},
      {options(1, 0, nan), "top_p"}, {options(1, 0, -0.5), "top_p"}, {options(0, 0, 2), "top_p"},
  };
  for (const Wrong& wrong : all) {
    try {
      Sampler sampler(wrong.options);
      ADD_FAILURE() << "accepted a wrong " << wrong.name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_EQ(std::string(error.what()).rfind(wrong.name, 0), 0u) << error.what();
    }
  }
}

}  // namespace
}  // namespace dsv4
