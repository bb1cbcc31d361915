// Selection of the best scores against a full sort, and its mapping to slots.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "backends/cpu/candidates.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {
namespace {

using Random = std::mt19937;
constexpr int32_t kGuard = 0x5a5a5a5a;

struct Selection {
  std::vector<int32_t> indices;  // [tokens][k]
  std::vector<int32_t> length;
  bool operator==(const Selection&) const = default;
};

// By definition: stable sort by descending score (NaN as -inf), first k, ascending, then -1.
Selection expected(const std::vector<float>& logits, int64_t width, const std::vector<int32_t>& end,
                   int64_t k) {
  Selection out;
  for (size_t t = 0; t < end.size(); ++t) {
    const float* row = logits.data() + static_cast<int64_t>(t) * width;
    const auto score = [&](int32_t i) { return std::isnan(row[i]) ? -INFINITY : row[i]; };
    std::vector<int32_t> order(static_cast<size_t>(end[t]));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return score(a) > score(b); });
    order.resize(static_cast<size_t>(std::min<int64_t>(end[t], k)));
    std::sort(order.begin(), order.end());
    out.length.push_back(static_cast<int32_t>(order.size()));
    order.resize(static_cast<size_t>(k), -1);
    out.indices.insert(out.indices.end(), order.begin(), order.end());
  }
  return out;
}

Selection run(const std::vector<float>& logits, int64_t width, const std::vector<int32_t>& end,
              int64_t k, int threads) {
  ThreadPool pool(threads);
  ScratchLimits limits;
  limits.num_threads = threads;
  limits.max_entries = *std::max_element(end.begin(), end.end());
  const int64_t bytes = top_k_scratch_bytes(limits);
  std::vector<std::byte> scratch(static_cast<size_t>(bytes + Arena::kAlignment), std::byte{0xff});
  void* base = scratch.data();
  size_t space = scratch.size();
  std::align(Arena::kAlignment, 1, base, space);
  Arena arena(static_cast<std::byte*>(base), bytes);
  const auto tokens = static_cast<int64_t>(end.size());
  const int64_t stride = k + 3;
  std::vector<int32_t> indices(static_cast<size_t>(tokens * stride), kGuard);
  std::vector<int32_t> length(end.size() + 1, kGuard);
  TopKParams params{};
  params.logits = ConstTensor(logits.data(), DType::kF32, {tokens, width});
  params.end = end.data();
  params.topk_indices = Tensor(indices.data(), DType::kI32, {tokens, k});
  params.topk_indices.strides[0] = stride;
  params.topk_length = length.data();
  top_k(params, OpContext{Stream{threads == 1 ? nullptr : &pool}, &arena, nullptr});
  Selection out;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto row = indices.begin() + t * stride;
    out.indices.insert(out.indices.end(), row, row + k);
    for (int64_t i = k; i < stride; ++i) EXPECT_EQ(row[i], kGuard) << "wrote past k";
  }
  EXPECT_EQ(length.back(), kGuard);
  length.pop_back();
  out.length = length;
  return out;
}

void expect_selection(const std::vector<float>& logits, int64_t width,
                      const std::vector<int32_t>& end, int64_t k, const char* what) {
  const Selection want = expected(logits, width, end, k);
  for (int threads : {1, 2, 3, 5}) {
    EXPECT_TRUE(run(logits, width, end, k, threads) == want)
        << what << ", k " << k << ", " << threads << " threads";
  }
}

TEST(TopK, AgreesWithASortForEveryKindOfScores) {
  Random random(1);
  std::normal_distribution<float> normal;
  const auto make = [&](int64_t count, int kind) {
    std::vector<float> scores(static_cast<size_t>(count));
    for (float& s : scores) {
      const float x = normal(random);
      switch (kind) {
        case 0:
          s = x;
          break;
        case 1:
          s = std::round(x);
          break;  // many ties
        case 2:
          s = 1.5f;
          break;  // nothing but ties
        case 3:
          s = std::max(0.0f, x);
          break;  // half of them zero
        case 4:
          s = x < 0 ? -0.0f : 0.0f;
          break;  // zeros of both signs tie
        case 5:
          s = std::ldexp(x, static_cast<int>(random() % 250) - 125);
          break;
        case 6:
          s = x > 1 ? NAN : x < -1 ? -INFINITY : x > 0.9f ? INFINITY : x;
          break;
        case 7:
          s = random() % 2 ? NAN : -INFINITY;
          break;  // all of them equal
        default:
          s = 1.0f + static_cast<float>(random() % 4096) * 0x1p-23f;  // low bits decide
      }
    }
    return scores;
  };
  const char* names[] = {"normal", "ties", "equal",   "relu",    "zeros",
                         "wide",   "nan",  "nothing", "low bits"};
  for (int kind = 0; kind < 9; ++kind) {
    for (const int64_t k : {1, 7, 64, 512, 2048}) {
      const std::vector<int32_t> ends = {0, 1, 63, 64, 65, 511, 513, 3000, 4096};
      expect_selection(make(9 * 4100, kind), 4100, ends, k, names[kind]);
    }
    // One token alone: its row is cut into parts.
    expect_selection(make(70001, kind), 70001, {70001}, 1024, names[kind]);
    expect_selection(make(40000, kind), 40000, {16385}, 512, names[kind]);
  }
}

TEST(TopK, SortedScoresInBothDirections) {
  std::vector<float> scores(30000);
  std::iota(scores.begin(), scores.end(), -15000.0f);
  expect_selection(scores, 30000, {30000}, 512, "ascending");
  std::reverse(scores.begin(), scores.end());
  expect_selection(scores, 30000, {30000}, 512, "descending");
}

// Every 16th score is large and the rest small: a sample with that stride promises more than there
// is, and the other way round.
TEST(TopK, PeriodicScores) {
  for (const bool large : {true, false}) {
    for (const int64_t offset : {0, 5}) {
      std::vector<float> scores(40000);
      for (size_t i = 0; i < scores.size(); ++i) {
        const bool special = i % 16 == static_cast<size_t>(offset) && i < 3200;
        scores[i] = (special == large ? 100.0f : 1.0f) + static_cast<float>(i % 97) * 0.001f;
      }
      expect_selection(scores, 40000, {40000}, 1024, "periodic");
      expect_selection(scores, 20000, {20000, 20000}, 1024, "periodic, two rows");
    }
  }
}

TEST(TopK, MeasuringTouchesNothing) {
  TopKParams params{};
  params.logits = ConstTensor(nullptr, DType::kF32, {4, 1000});
  params.topk_indices = Tensor(nullptr, DType::kI32, {4, 64});
  Arena measuring;
  top_k(params, OpContext{Stream{}, &measuring, nullptr});
  ScratchLimits limits;
  limits.max_entries = 1000;
  EXPECT_GT(measuring.peak(), 0);
  EXPECT_LE(measuring.peak(), top_k_scratch_bytes(limits));
}

TEST(MapSlots, FollowsTheBlockTable) {
  const std::vector<int32_t> table = {9, 4, 7, 0, 1, 2};  // 2 sequences x 3 columns
  const std::vector<int32_t> entries = {0, 1, 5, 8, -1, 3, 4, 11, -1, -1};
  const std::vector<int32_t> token_to_seq = {0, 1};
  std::vector<int32_t> slots(12, kGuard);
  MapSlotsParams params{};
  params.topk_indices = ConstTensor(entries.data(), DType::kI32, {2, 5});
  params.token_to_seq = token_to_seq.data();
  params.blocks = {table.data(), 3, 3, 16};
  params.rows_per_block = 4;
  params.slots = Tensor(slots.data(), DType::kI32, {2, 5});
  params.slots.strides[0] = 6;
  map_slots(params, OpContext{});
  const std::vector<int32_t> want = {36, 37, 17, 28, -1, kGuard, 3, 4, 11, -1, -1, kGuard};
  // Sequence 1: entry 3 -> block 0 row 3, 4 -> block 1 row 0, 11 -> block 2 row 3.
  EXPECT_EQ(slots, want);
}

}  // namespace
}  // namespace dsv4::cpu
