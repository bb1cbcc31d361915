// Indexer scores where only the best matter: the same are chosen as from all scores, with the same
// bits; bounds bound.
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/index_bounds.h"
#include "tests/backends/cpu/ops/index_logits_testing.h"

namespace dsv4::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The entries of a row that a selection takes, NaN as -inf, smaller entries first among equals.
std::vector<int> best_of(const float* scores, int count, int best) {
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto value = [&](int i) { return std::isnan(scores[i]) ? -kInfinity : scores[i]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return value(a) > value(b); });
  order.resize(static_cast<size_t>(std::min(count, best)));
  return order;
}

void expect_same_choice(const Case& c, int best, const std::string& what) {
  IndexLogitsParams params = c.params();
  const auto width = static_cast<size_t>(c.max_end + 5);
  for (const Candidate& candidate : index_logits_candidates()) {
    if (!candidate.why_not().empty() || candidate.name == "reference") continue;
    params.best = 0;
    const std::vector<float> all = run(candidate, params, 2);
    params.best = best;
    for (const int threads : {1, 2, 3}) {
      const std::vector<float> some = run(candidate, params, threads);
      for (size_t t = 0; t < c.end.size(); ++t) {
        const float *expected = all.data() + t * width, *actual = some.data() + t * width;
        const std::vector<int> chosen = best_of(expected, c.end[t], best);
        ASSERT_EQ(best_of(actual, c.end[t], best), chosen)
            << candidate.name << ", " << threads << " threads, token " << t << ", " << what;
        for (const int entry : chosen) {
          ASSERT_TRUE(std::isnan(expected[entry]) ||
                      std::memcmp(actual + entry, expected + entry, 4) == 0)
              << candidate.name << ", token " << t << ", entry " << entry << ", " << what;
        }
      }
    }
  }
}

// Did the call leave scores out, so that a test that expects it has tested something?
bool leaves_out(const Candidate& candidate, const Case& c, int best) {
  IndexLogitsParams params = c.params();
  const std::vector<float> all = run(candidate, params, 1);
  params.best = best;
  return std::memcmp(run(candidate, params, 1).data(), all.data(), all.size() * 4) != 0;
}

CaseOptions options(int heads, std::vector<int> ends, int seqs = 1, int dim = 128) {
  CaseOptions o;
  o.heads = heads;
  o.dim = dim;
  o.ends = std::move(ends);
  o.seqs = seqs;
  return o;
}

void for_each_row(const Case& c, const std::function<void(const RowAddress&, int)>& f) {
  for (int seq = 0; seq < c.options.seqs; ++seq) {
    int used = 0;
    for (size_t t = 0; t < c.end.size(); ++t) {
      if (c.token_to_seq[t] == seq) used = std::max(used, c.end[t]);
    }
    for (int j = 0; j < used; ++j) f(row_address(c.view, c.slot(seq, j)), j);
  }
}
void set_scale(const RowAddress& row, float scale) {
  std::memcpy(row.scales, &scale, sizeof(scale));
}

TEST(BestIndexLogits, ChoosesWhatAllScoresChoose) {
  Random random(1);
  for (const int heads : {1, 3, 16, 17, 33, 64, 65, 128}) {
    const Case c(random, options(heads, {1500}));
    for (const int best : {1, 7, 20}) {
      expect_same_choice(c, best, concat("heads ", heads, ", best ", best));
    }
  }
  for (const int dim : {256, 512, 640}) {
    expect_same_choice(Case(random, options(20, {1100}, 1, dim)), 9, concat("dim ", dim));
  }
}

TEST(BestIndexLogits, LeavesScoresOutWhereItCan) {
  Random random(2);
  const Case c(random, options(64, {3000}));
  for (const Candidate& candidate : index_logits_candidates()) {
    if (!candidate.name.starts_with("avx512") || !why_not_avx512vbmi().empty()) continue;
    if (!candidate.why_not().empty() || candidate.name == "avx512") continue;
    EXPECT_TRUE(leaves_out(candidate, c, 10));
    EXPECT_FALSE(leaves_out(candidate, c, 100)) << "too few keys";
  }
}

TEST(BestIndexLogits, TokensAndSequencesOfAllLengths) {
  Random random(3);
  std::vector<int> ends;
  for (int t = 0; t < 23; ++t) ends.push_back(t % 5 == 0 ? pick(random, 0, 300) : 900 + 31 * t);
  CaseOptions o = options(24, ends, 3);
  o.rows_per_block = 7;
  expect_same_choice(Case(random, o), 10, "many tokens");
}

TEST(BestIndexLogits, EqualScoresAndOutliers) {
  Random random(4);
  for (const int kinds : {1, 2, 5}) {
    Case c(random, options(64, {2000, 2000}));
    std::vector<std::vector<float>> keys(static_cast<size_t>(kinds), std::vector<float>(128));
    for (auto& key : keys) {
      for (float& v : key) v = uniform(random, 1);
    }
    for (int j = 0; j < 2000; ++j) {
      encode_row(c.view, c.slot(0, j),
                 keys[static_cast<size_t>(pick(random, 0, kinds - 1))].data());
    }
    expect_same_choice(c, 12, concat(kinds, " different keys"));
  }
  // One sign of all weights; scores of all keys 0; few keys far above the others.
  for (const float weight : {0.1f, -0.1f, 0.0f}) {
    Case c(random, options(64, {2000}));
    std::fill(c.weights.begin(), c.weights.end(), weight);
    for_each_row(c, [&](const RowAddress& row, int j) {
      if (j % 300 == 7) set_scale(row, 3.0f + static_cast<float>(j));
    });
    expect_same_choice(c, 12, concat("weight ", weight));
  }
}

void set_codes(const RowAddress& row, const std::function<float(int)>& value) {
  for (int i = 0; i < 128; ++i) row.values[i] = std::byte{f32_to_e4m3(value(i))};
}

// Ten keys with loose bounds and nothing behind them, nine good ones, and a tenth whose bound is
// below all of these: the tenth is the last one chosen, and has its own score.
TEST(BestIndexLogits, ChosenKeysBelowTheCutoff) {
  Random random(7);
  Case c(random, options(64, {2000}));
  std::fill(c.weights.begin(), c.weights.end(), 0.1f);
  std::fill(c.q_bf16.begin(), c.q_bf16.end(), f32_to_bf16(448));
  for_each_row(c, [&](const RowAddress& row, int j) {
    const int kind = j % 16 == 0 ? j / 16 : -1;  // the sample looks at these
    const bool loose = kind >= 0 && kind < 4, good = kind >= 10 && kind < 19, tenth = j == 777;
    set_codes(row, [&](int i) {
      return loose ? (i % 2 == 0 ? 5.5f : -5.5f) : good || tenth ? 64 : i % 2 == 0 ? 32 : -40;
    });
    set_scale(row, loose ? 1000.0f : good ? 1.0f : tenth ? 0.5f : 0.01f);
  });
  expect_same_choice(c, 10, "loose bounds");
}

// Bytes that index_query and the compressor never write.
TEST(BestIndexLogits, AnyBytes) {
  Random random(5);
  for (int round = 0; round < 6; ++round) {
    Case c(random, options(40, {1500}));
    for_each_row(c, [&](const RowAddress& row, int j) {
      for (int i = 0; i < 128; ++i) {
        row.values[i] = std::byte{static_cast<unsigned char>(pick(random, 0, 255))};
        const bool nan = (row.values[i] & std::byte{0x7f}) == std::byte{0x7f};
        if (nan && (round != 0 || j % 3 != 0)) row.values[i] = std::byte{0x20};
      }
      const float scales[] = {std::ldexp(1.0f, pick(random, -149, 100)),
                              uniform(random, 1),
                              NAN,
                              kInfinity,
                              -kInfinity,
                              0.0f,
                              -0.0f,
                              1.0f};
      set_scale(row, round == 1 ? scales[pick(random, 0, 7)] : scales[round < 4 ? 1 : 0]);
    });
    for (size_t i = 0; i < c.q_bf16.size(); ++i) {
      // Not only E4M3: any magnitude, some heads all zero or with one large value.
      float v = c.q[i];
      if (round >= 2) v *= std::ldexp(1.0f, pick(random, -20, 20));
      if (i / 128 % 7 == 3) v = 0;
      if (i / 128 % 7 == 4 && i % 128 == 9) v = 1e20f;
      if (round == 3 && i == 300) v = NAN;
      if (round == 4 && i == 300) v = kInfinity;
      if (round == 5) v *= 1e-30f;
      c.q_bf16[i] = f32_to_bf16(v);
    }
    if (round == 2) c.weights[5] = kInfinity;
    if (round == 3) c.weights[5] = 1e38f;
    expect_same_choice(c, 11, concat("round ", round));
  }
}

#if defined(__x86_64__)
// Every bound, not only those that decide; and not so far off that nothing could be left out.
TEST(BestIndexLogits, BoundsBound) {
  if (!why_not_avx512vbmi().empty()) GTEST_SKIP() << why_not_avx512vbmi();
  const IndexBoundKernel& kernel = index_bound_avx512vbmi();
  Random random(6);
  for (const int heads : {1, 5, 64, 80}) {
    for (int round = 0; round < 8; ++round) {
      Case c(random, options(heads, {256}));
      if (round >= 6) std::fill(c.weights.begin(), c.weights.end(), 0.1f);
      for (size_t i = 0; i < c.q.size(); ++i) {
        float v = c.q[i];
        // Heads alike, so that rounding errors add up; small codes, which are all rounded; any
        // sign.
        if (round == 1) v = c.q[i % 128];
        if (round == 2) v = e4m3_to_f32(f32_to_e4m3(uniform(random, 3)));
        if (round == 3) v = e4m3_to_f32(f32_to_e4m3(i % 128 == 0 ? 448 : 6 + uniform(random, 1)));
        // As far off as can be, all of a sign: keys of 5.5 become 4, and so do such queries.
        if (round == 6) v = 448;
        if (round == 7) v = i % 128 == 0 ? 448 : 5.5f;
        c.q_bf16[i] = f32_to_bf16(v);
      }
      for_each_row(c, [&](const RowAddress& row, int j) {
        if (round == 3) set_codes(row, [&](int) { return 6 + uniform(random, 1); });
        if (round == 4) set_codes(row, [&](int) { return uniform(random, j % 2 == 0 ? 3 : 30); });
        if (round == 6) set_codes(row, [&](int) { return 5.5f; });
        if (round == 7) set_codes(row, [&](int i) { return i == 0 ? 0.0f : 64.0f; });
        set_scale(row, round == 5 ? uniform(random, 1) : std::ldexp(1.0f, pick(random, -9, -7)));
      });
      const std::vector<float> scores = run(index_logits_candidates().back(), c.params(), 1);
      std::vector<std::byte> packed(static_cast<size_t>(bound_packed_bytes(heads, 128)) + 64),
          scratch(static_cast<size_t>(bound_scratch_bytes(heads, 128)) + 64);
      ASSERT_TRUE(kernel.pack(c.q_bf16.data(), 128, c.weights.data(), heads, 128, packed.data(),
                              scratch.data()));
      double error = 0, spread = 0;
      for (int block = 0; block < 256; block += kKeyBlock) {
        KeyRows rows;
        resolve_keys(c.params(), 0, block, 256, rows);
        std::vector<uint8_t> codes(kKeyBlock * 128);
        ByteKeys keys;
        keys.codes = codes.data();
        kernel.load_keys(rows, 128, keys);
        alignas(64) float lanes[kKeyBlock * kIndexLanes], upper[kKeyBlock];
        kernel.bound(packed.data(), keys, kKeyBlock, heads, 128, lanes, upper, nullptr);
        for (int j = 0; j < kKeyBlock; ++j) {
          const float score = scores[static_cast<size_t>(block + j)];
          ASSERT_GE(upper[j], score)
              << "entry " << block + j << ", heads " << heads << ", round " << round;
          error += upper[j] - score;
          spread += std::fabs(score);
        }
      }
      if (round == 0 && heads == 64) {
        EXPECT_LT(error, 0.4 * spread);
      }
      // Nothing of the estimate is given away there.
      if (round >= 6) {
        EXPECT_LT(error, (round == 6 ? 0.4 : 0.5) * spread);
      }
    }
  }
}
#endif

}  // namespace
}  // namespace dsv4::cpu
