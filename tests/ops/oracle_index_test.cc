// The indexer against the oracle: scores of every candidate, selection, slots.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/numbers.h"
#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

class OracleIndexLogits : public CandidateTest {
 protected:
  /// Extra error of a head's dot product with sum |q||k| = `head_magnitude`.
  double matrix_unit_bound(KvFormat format, int dim, double head_magnitude) const {
    return adds_in_fp8_unit(format) ? e4m3_unit_bound(dim, head_magnitude) : 0;
  }
  /// The CUDA candidates do, whether or not they want them.
  bool takes_codes() const { return GetParam().platform == Platform::kCuda; }
  bool adds_in_fp8_unit(KvFormat format) const {
    return GetParam().platform == Platform::kCuda && GetParam().name == "sm90" &&
           format == KvFormat::kIndexFp8;
  }

  /// Scores of tokens [first, first + count) of one set of inputs, in a call of their own.
  class Calls {
   public:
    Calls(OracleIndexLogits& test, const ConstTensor& queries, const ConstTensor& weights,
          const std::vector<int32_t>& token_to_seq, const std::vector<int32_t>& end,
          const BlockTable& blocks, const CacheView& cache)
        : test_(test),
          queries_(queries),
          weights_(weights),
          seqs_(test.memory().put(token_to_seq)),
          ends_(test.memory().put(end)),
          blocks_(blocks),
          cache_(cache) {}
    std::vector<float> operator()(int first, int count, int32_t max_end) const {
      const Tensor logits = test_.memory().tensor(DType::kF32, {count, max_end});
      ScratchLimits limits;
      limits.max_tokens = count;
      limits.index_heads = static_cast<int>(queries_.shape[1]);
      limits.index_dim = static_cast<int>(queries_.shape[2]);
      limits.max_entries = max_end;
      test_.run(test_.ops_.index_logits,
                {.q = queries_.rows(first, count),
                 .weights = weights_.rows(first, count),
                 .token_to_seq = seqs_ + first,
                 .end = ends_ + first,
                 .max_end = max_end,
                 .blocks = blocks_,
                 .cache = cache_,
                 .logits = logits},
                limits);
      return test_.memory().get(logits.as<float>(), int64_t{count} * max_end);
    }

   private:
    OracleIndexLogits& test_;
    ConstTensor queries_, weights_;
    const int32_t *seqs_, *ends_;
    BlockTable blocks_;
    CacheView cache_;
  };
};

TEST_P(OracleIndexLogits, EveryFormatAgrees) {
  struct Case {
    KvFormat format;
    int heads, dim, rows_per_block;
  };
  for (const Case& which :
       {Case{KvFormat::kIndexFp8, 64, 128, 64}, Case{KvFormat::kIndexFp8, 8, 128, 16},
        Case{KvFormat::kIndexFp8, 64, 128, 4}, Case{KvFormat::kIndexFp8, 3, 128, 2},
        Case{KvFormat::kIndexFp8, 64, 128, 128}, Case{KvFormat::kIndexFp8, 64, 128, 192},
        Case{KvFormat::kIndexFp8, 16, 128, 96}, Case{KvFormat::kIndexMxfp4, 64, 128, 96},
        Case{KvFormat::kIndexMxfp4, 64, 128, 64}, Case{KvFormat::kIndexMxfp4, 5, 128, 2},
        Case{KvFormat::kIndexF32, 8, 128, 64}, Case{KvFormat::kIndexF32, 4, 64, 16}}) {
    SCOPED_TRACE(::testing::Message() << kv_format_name(which.format) << ", " << which.heads
                                      << " heads, " << which.rows_per_block << " rows a block");
    const bool exact = which.format == KvFormat::kIndexF32;
    if (exact && !this->exact()) continue;
    const DType act = exact ? DType::kF32 : DType::kBf16;
    constexpr int kSeqs = 2, kEntries = 150, kTokens = 9, kRatio = 4;
    const int columns = (kEntries + which.rows_per_block - 1) / which.rows_per_block;
    Random random(21);
    const std::vector<int32_t> table = random.permutation(kSeqs * columns + 2);
    PagedCache cache(memory(), which.format, which.dim, which.rows_per_block, kSeqs * columns + 2);
    const auto slot = [&](int seq, int j) {
      const int32_t block = table[static_cast<size_t>(seq * columns + j / which.rows_per_block)];
      return int64_t{block} * which.rows_per_block + j % which.rows_per_block;
    };
    for (int seq = 0; seq < kSeqs; ++seq) {
      for (int j = 0; j < kEntries; ++j) {
        cache.write(slot(seq, j), normal_values(random, which.dim, 1.0));
      }
    }
    cache.upload();

    // Queries as index_query leaves them: codes without FP8's scale, values of MXFP4, or floats.
    Vector q = normal_values(random, int64_t{kTokens} * which.heads * which.dim, 3.0);
    for (double& value : q) {
      value = which.format == KvFormat::kIndexFp8     ? e4m3_value(40 * value, 0)
              : which.format == KvFormat::kIndexMxfp4 ? e2m1_value(value, -1)
                                                      : oracle::round_f32(value);
    }
    const Vector weights =
        rounded(DType::kF32, normal_values(random, int64_t{kTokens} * which.heads, 0.01));
    std::vector<int32_t> token_to_seq, end;
    for (int t = 0; t < kTokens; ++t) {
      token_to_seq.push_back(t % kSeqs);
      const int ends[] = {0, 1, 2, 63, 64, 65, 128, 149, 150};
      end.push_back(ends[t]);
    }
    Tensor logits = memory().tensor(DType::kF32, {kTokens, kEntries + 6});
    ScratchLimits limits;
    limits.max_tokens = kTokens;
    limits.index_heads = which.heads;
    limits.index_dim = which.dim;
    limits.max_entries = kEntries;
    const IndexLogitsParams params{
        .q = memory().tensor(act, {kTokens, which.heads, which.dim}, q),
        .weights = memory().tensor(DType::kF32, {kTokens, which.heads}, weights),
        .token_to_seq = memory().put(token_to_seq),
        .end = memory().put(end),
        .max_end = kEntries,
        .blocks = {memory().put(table), columns, columns, which.rows_per_block * kRatio},
        .cache = cache.view(),
        .logits = logits};
    run(ops_.index_logits, params, limits);

    const Vector actual = memory().numbers(logits);
    Comparison comparison("index_logits [token, entry]");
    double products = 0, squares = 0;
    for (int t = 0; t < kTokens; ++t) {
      const auto token_q = std::span(q).subspan(static_cast<size_t>(t) * which.heads * which.dim,
                                                static_cast<size_t>(which.heads) * which.dim);
      const auto token_w = std::span(weights).subspan(static_cast<size_t>(t) * which.heads,
                                                      static_cast<size_t>(which.heads));
      for (int64_t j = 0; j < logits.shape[1]; ++j) {
        const double value = actual[t * logits.shape[1] + j];
        if (j >= end[t]) {
          ASSERT_TRUE(std::isnan(value)) << "logit " << j << " past the end of token " << t;
          continue;
        }
        const Vector key = cache.read(slot(token_to_seq[t], static_cast<int>(j)));
        double magnitude = 0, unit_bound = 0;
        for (int h = 0; h < which.heads; ++h) {
          double dot = 0;
          for (int d = 0; d < which.dim; ++d) {
            dot += std::abs(token_q[static_cast<size_t>(h * which.dim + d)] * key[d]);
          }
          const double weight = std::abs(token_w[static_cast<size_t>(h)]);
          magnitude += weight * dot;
          unit_bound += weight * matrix_unit_bound(which.format, which.dim, dot);
        }
        // A dot product of dim terms, a sum over heads, the key's scale.
        const double bound = dot_bound(which.dim + which.heads + 8, magnitude) + unit_bound;
        const double expected = oracle::index_score(token_q, token_w, key);
        comparison.add({t, j}, value, expected, bound);
        products += value * expected;
        squares += value * value + expected * expected;
      }
    }
    EXPECT_TRUE(comparison.result());
    // Worst cases of single sums are wide in the FP8 unit; all scores together must be as near as
    // public tests of such kernels ask (numerics.md 6).
    EXPECT_LT(1 - 2 * products / squares, 5e-6);
    clear_memory();
  }
}

// A token's scores are the same bits alone or beside others, whatever the width of the call.
TEST_P(OracleIndexLogits, BitsDependOnTheTokenOnly) {
  constexpr int kHeads = 64, kDim = 128, kRows = 64, kSeqs = 3, kColumns = 5, kTokens = 21;
  for (KvFormat format : {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4}) {
    SCOPED_TRACE(kv_format_name(format));
    Random random(31);
    const std::vector<int32_t> table = random.permutation(kSeqs * kColumns);
    PagedCache cache(memory(), format, kDim, kRows, kSeqs * kColumns);
    for (int64_t slot = 0; slot < kSeqs * kColumns * kRows; ++slot) {
      cache.write(slot, normal_values(random, kDim, 1.0));
    }
    cache.upload();
    Vector q = normal_values(random, int64_t{kTokens} * kHeads * kDim, 3.0);
    for (double& value : q) {
      value = format == KvFormat::kIndexFp8 ? e4m3_value(40 * value, 0) : e2m1_value(value, -1);
    }
    const ConstTensor queries = memory().tensor(DType::kBf16, {kTokens, kHeads, kDim}, q);
    const ConstTensor weights =
        memory().tensor(DType::kF32, {kTokens, kHeads},
                        rounded(DType::kF32, normal_values(random, kTokens * kHeads, 0.01)));
    std::vector<int32_t> token_to_seq, end;
    for (int t = 0; t < kTokens; ++t) {
      token_to_seq.push_back(t * kSeqs / kTokens);  // runs of 7: prefill
      end.push_back(t % 4 == 3 ? 5 : kColumns * kRows - 13 * (t % 5));
    }
    const Calls scores(*this, queries, weights, token_to_seq, end,
                       {memory().put(table), kColumns, kColumns, kRows * 4}, cache.view());
    const std::vector<float> all = scores(0, kTokens, kColumns * kRows);
    for (int t = 0; t < kTokens; ++t) {
      const std::vector<float> alone = scores(t, 1, end[t]);
      EXPECT_EQ(std::memcmp(alone.data(), &all[static_cast<size_t>(t * kColumns * kRows)],
                            static_cast<size_t>(end[t]) * sizeof(float)),
                0)
          << "token " << t;
    }
    // Queries as codes are the same queries.
    if (format == KvFormat::kIndexFp8 && takes_codes()) {
      std::vector<uint8_t> codes;
      for (double value : q) codes.push_back(f32_to_e4m3(static_cast<float>(value)));
      const ConstTensor coded(memory().put(codes), DType::kF8E4M3, {kTokens, kHeads, kDim});
      const Calls of_codes(*this, coded, weights, token_to_seq, end,
                           {memory().put(table), kColumns, kColumns, kRows * 4}, cache.view());
      const std::vector<float> same = of_codes(0, kTokens, kColumns * kRows);
      EXPECT_EQ(std::memcmp(same.data(), all.data(), all.size() * sizeof(float)), 0);
    }
    clear_memory();
  }
}

// Enough work that every block of a GPU has several sequences or a long part of one: prompts and
// single tokens side by side, few or many, without order in their lengths; or all nearly alike.
TEST_P(OracleIndexLogits, ManySequencesInOneCall) {
  constexpr int kHeads = 8, kDim = 128, kRows = 64, kBlocks = 50;
  const bool slow = GetParam().platform == Platform::kCpu && GetParam().name == "reference";
  const int columns = slow ? 2 : 32, entries = columns * kRows;
  struct Case {
    int seqs;
    bool alike;
    int compared;  // every so many tokens
  };
  for (const Case& which : {Case{64, false, 3}, Case{300, false, 23}, Case{130, true, 7}}) {
    if (which.seqs > 64 && GetParam().platform != Platform::kCuda) continue;
    SCOPED_TRACE(::testing::Message()
                 << which.seqs << " sequences" << (which.alike ? ", alike" : ""));
    Random random(41);
    // Sequences share blocks.
    std::vector<int32_t> table;
    for (int i = 0; i < which.seqs * columns; ++i) {
      table.push_back(static_cast<int32_t>(random.below(kBlocks)));
    }
    PagedCache cache(memory(), KvFormat::kIndexFp8, kDim, kRows, kBlocks);
    for (int64_t slot = 0; slot < kBlocks * kRows; ++slot) {
      cache.write(slot, normal_values(random, kDim, 1.0));
    }
    cache.upload();
    std::vector<int32_t> token_to_seq, end;
    for (int seq = 0; seq < which.seqs; ++seq) {
      const int64_t tokens = which.alike ? 1 : seq % 5 == 2 ? 10 : seq % 7 == 3 ? 2 : 1;
      for (int64_t i = 0; i < tokens; ++i) {
        token_to_seq.push_back(seq);
        end.push_back(which.alike    ? entries - static_cast<int32_t>(random.below(kRows))
                      : seq % 9 == 4 ? 0
                                     : static_cast<int32_t>(random.below(entries + 1)));
      }
    }
    const auto tokens = static_cast<int>(end.size());
    Vector q = normal_values(random, int64_t{tokens} * kHeads * kDim, 3.0);
    for (double& value : q) value = e4m3_value(40 * value, 0);
    const ConstTensor queries = memory().tensor(DType::kBf16, {tokens, kHeads, kDim}, q);
    const ConstTensor weights =
        memory().tensor(DType::kF32, {tokens, kHeads},
                        rounded(DType::kF32, normal_values(random, tokens * kHeads, 0.01)));
    const Calls scores(*this, queries, weights, token_to_seq, end,
                       {memory().put(table), columns, columns, kRows * 4}, cache.view());
    const std::vector<float> all = scores(0, tokens, entries);
    for (int t = 0; t < tokens; ++t) {
      const float* row = &all[static_cast<size_t>(t) * static_cast<size_t>(entries)];
      for (int j = end[static_cast<size_t>(t)]; j < entries; ++j) {
        ASSERT_TRUE(std::isnan(row[j])) << "logit " << j << " past the end of token " << t;
      }
      const int32_t count = end[static_cast<size_t>(t)];
      if (t % which.compared != 0 || count == 0) continue;
      const std::vector<float> alone = scores(t, 1, count);
      EXPECT_EQ(std::memcmp(alone.data(), row, static_cast<size_t>(count) * sizeof(float)), 0)
          << "token " << t;
    }
    clear_memory();
  }
}

// A long prompt keeps shared memory busy: whatever is read from a place of a ring must have been
// read before the place is filled again. Where it is not, a few keys of a few tokens differ from
// call to call.
TEST_P(OracleIndexLogits, LongPromptIsTheSameEveryTime) {
  constexpr int kHeads = 64, kDim = 128, kRows = 64;
  const bool large = GetParam().platform == Platform::kCuda;
  const int columns = large ? 32 : 2, entries = columns * kRows;
  const int tokens = large ? 1024 : 16, calls = large ? 12 : 2;
  Random random(43);
  const std::vector<int32_t> table = random.permutation(columns);
  PagedCache cache(memory(), KvFormat::kIndexFp8, kDim, kRows, columns);
  for (int64_t slot = 0; slot < entries; ++slot) {
    cache.write(slot, normal_values(random, kDim, 1.0));
  }
  cache.upload();
  Vector q = normal_values(random, int64_t{tokens} * kHeads * kDim, 3.0);
  for (double& value : q) value = e4m3_value(40 * value, 0);
  const ConstTensor queries = memory().tensor(DType::kBf16, {tokens, kHeads, kDim}, q);
  const ConstTensor weights =
      memory().tensor(DType::kF32, {tokens, kHeads},
                      rounded(DType::kF32, normal_values(random, tokens * kHeads, 0.01)));
  const std::vector<int32_t> token_to_seq(static_cast<size_t>(tokens), 0);
  const std::vector<int32_t> end(static_cast<size_t>(tokens), entries);
  const Calls scores(*this, queries, weights, token_to_seq, end,
                     {memory().put(table), columns, columns, kRows * 4}, cache.view());
  // A few tokens at a time leave shared memory idle.
  std::vector<float> expected;
  for (int first = 0; first < tokens; first += 8) {
    const std::vector<float> few = scores(first, 8, entries);
    expected.insert(expected.end(), few.begin(), few.end());
  }
  for (int call = 0; call < calls; ++call) {
    const std::vector<float> all = scores(0, tokens, entries);
    size_t different = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      if (std::memcmp(&all[i], &expected[i], sizeof(float)) != 0) ++different;
    }
    EXPECT_EQ(different, 0u) << "call " << call << ", of " << all.size() << " scores";
  }
  clear_memory();
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleIndexLogits,
                         ::testing::ValuesIn(op_candidates("index_logits")), candidate_name);

class OracleTopK : public CandidateTest {};

TEST_P(OracleTopK, OrdersByScoreThenIndex) {
  constexpr int kTokens = 40, kEntries = 700;
  Random random(5);
  std::vector<float> logits(kTokens * kEntries);
  std::vector<int32_t> end;
  for (int t = 0; t < kTokens; ++t) {
    const int ends[] = {0, 1, 63, 64, 65, 300, 699, 700};
    end.push_back(ends[t % 8]);
    for (int j = 0; j < kEntries; ++j) {
      float& value = logits[static_cast<size_t>(t * kEntries + j)];
      // Few distinct values, so that ties decide; and what is not a number.
      value = t % 3 == 0 ? static_cast<float>(random.normal())
                         : static_cast<float>(random.below(t % 3 == 1 ? 5 : 40)) - 3.0f;
      if (t % 5 == 0 && random.below(9) == 0) value = std::numeric_limits<float>::quiet_NaN();
      if (t % 7 == 0 && random.below(9) == 0) value = -std::numeric_limits<float>::infinity();
      if (t % 11 == 0 && random.below(50) == 0) value = std::numeric_limits<float>::infinity();
      if (random.below(20) == 0) value = random.below(2) == 0 ? 0.0f : -0.0f;
    }
  }
  for (int k : {1, 64, 512, 1024}) {
    const std::vector<int32_t> blank(static_cast<size_t>(kTokens * k), -7);
    int32_t* indices = memory().put(blank);
    int32_t* length = memory().put(std::vector<int32_t>(kTokens, -7));
    ScratchLimits limits;
    limits.max_tokens = kTokens;
    limits.max_entries = kEntries;
    limits.index_topk = k;
    const TopKParams params{
        .logits = ConstTensor(memory().put(logits), DType::kF32, {kTokens, kEntries}),
        .end = memory().put(end),
        .topk_indices = Tensor(indices, DType::kI32, {kTokens, k}),
        .topk_length = length};
    run(ops_.top_k, params, limits);
    const std::vector<int32_t> actual = memory().get(indices, int64_t{kTokens} * k);
    const std::vector<int32_t> actual_length = memory().get(length, kTokens);
    for (int t = 0; t < kTokens; ++t) {
      const Vector scores(logits.begin() + t * kEntries, logits.begin() + t * kEntries + end[t]);
      std::vector<int32_t> expected = oracle::top_k(scores, k);
      EXPECT_EQ(actual_length[t], static_cast<int32_t>(expected.size())) << "token " << t;
      expected.resize(static_cast<size_t>(k), -1);
      EXPECT_EQ(std::vector<int32_t>(actual.begin() + t * k, actual.begin() + (t + 1) * k),
                expected)
          << "token " << t << ", k " << k;
    }
  }
}

// Rows of every length, and what a kernel that samples, cuts rows into parts or counts in bins may
// stumble over.
enum class Scores {
  kNormal,
  kTies,
  kEqual,
  kAscending,
  kDescending,
  kNans,
  kNarrow,
  kLateOnes,
  kUniform,
  kManyMagnitudes,
  kZeros,
  kPeriod,
  kTwoValues,
  kInfinite,
  kEnd
};

float score_at(Scores kind, int64_t i, int64_t n, Random& random) {
  const float normal = static_cast<float>(random.normal());
  switch (kind) {
    case Scores::kNormal:
      return normal;
    case Scores::kTies:
      return static_cast<float>(random.below(7));
    case Scores::kEqual:
      return 0.25f;
    case Scores::kAscending:
      return static_cast<float>(i - n / 2);
    case Scores::kDescending:
      return static_cast<float>(n / 2 - i);
    case Scores::kNans:  // fewer numbers than are wanted
      return random.below(n) < 300 ? normal : std::numeric_limits<float>::quiet_NaN();
    case Scores::kNarrow:  // all in one bin of 11 bits
      return 1000.0f + static_cast<float>(random.below(4096)) * 0x1p-10f;
    case Scores::kLateOnes:  // the best are neighbours, and rare in a sample
      return i >= n - 600 ? 50.0f + normal : normal;
    case Scores::kUniform:
      return static_cast<float>(random.below(1 << 24)) * 0x1p-24f;
    case Scores::kManyMagnitudes:
      return std::ldexp(normal, static_cast<int>(random.below(240)) - 140);
    case Scores::kZeros:  // fewer positive ones than are wanted
      return random.below(n) < 400   ? std::abs(normal)
             : random.below(50) == 0 ? -normal * normal
             : random.below(2) == 0  ? 0.0f
                                     : -0.0f;
    case Scores::kPeriod:
      return static_cast<float>(i * 37 % 64) - 20.0f;
    case Scores::kTwoValues:  // ties that begin late in the row
      return i > n / 2 ? 1.0f : random.below(n) < 100 ? 2.0f : -1.0f;
    case Scores::kInfinite: {
      const float infinity = std::numeric_limits<float>::infinity();
      const uint64_t which = random.below(n);
      return which < 200 ? infinity : which < 400 ? 3e38f : which % 3 == 0 ? -infinity : -3e38f;
    }
    case Scores::kEnd:
      break;
  }
  return 0;
}

TEST_P(OracleTopK, RowsOfEveryKind) {
  constexpr int64_t kKinds = static_cast<int64_t>(Scores::kEnd);
  struct Case {
    int64_t tokens, n;
    int k;
    int64_t padding;  // of a row: other alignments
  };
  for (const Case& which :
       {Case{8, 1, 512, 0}, Case{8, 63, 64, 1}, Case{kKinds, 513, 512, 3},
        Case{kKinds, 1000, 512, 2}, Case{kKinds, 2048, 512, 0}, Case{kKinds, 2111, 64, 1},
        Case{kKinds, 4095, 1024, 0}, Case{kKinds, 4096, 2048, 4}, Case{kKinds, 4097, 512, 0},
        Case{kKinds, 8200, 1024, 0}, Case{1, 65536, 512, 0}, Case{kKinds, 40000, 512, 0},
        Case{kKinds, 65536, 1024, 1}, Case{72, 20000, 512, 4}, Case{300, 9000, 1024, 0},
        Case{kKinds, 262144, 512, 0}, Case{8, 262144, 2048, 3}, Case{5, 1000000, 1024, 0}}) {
    if (emulated() && which.tokens * which.n > 100'000) continue;
    SCOPED_TRACE(::testing::Message()
                 << which.tokens << " rows of " << which.n << ", k " << which.k);
    Random random(static_cast<uint64_t>(which.n + which.k));
    const int64_t stride = which.n + which.padding, k = which.k;
    std::vector<float> logits(static_cast<size_t>(which.tokens * stride), 1e30f);
    std::vector<int32_t> end;
    for (int64_t t = 0; t < which.tokens; ++t) {
      // Some rows end earlier: what lies behind must not count.
      end.push_back(static_cast<int32_t>(t % 8 == 7   ? which.n - which.n / 3
                                         : t % 8 == 5 ? std::min<int64_t>(which.n, 3001)
                                                      : which.n));
      const auto kind = static_cast<Scores>((t + which.tokens) % kKinds);
      for (int64_t i = 0; i < end.back(); ++i)
        logits[static_cast<size_t>(t * stride + i)] = score_at(kind, i, end.back(), random);
    }
    int32_t* indices =
        memory().put(std::vector<int32_t>(static_cast<size_t>(which.tokens * k), -7));
    int32_t* length = memory().put(std::vector<int32_t>(static_cast<size_t>(which.tokens), -7));
    ConstTensor rows(memory().put(logits), DType::kF32, {which.tokens, which.n});
    rows.strides[0] = stride;
    // Two sequences, whose blocks lie anywhere.
    const int rows_per_block = which.k == 512 ? 64 : 12;
    const int64_t columns = (which.n + rows_per_block - 1) / rows_per_block;
    const std::vector<int32_t> table = random.permutation(static_cast<int>(2 * columns));
    std::vector<int32_t> token_to_seq;
    for (int64_t t = 0; t < which.tokens; ++t) token_to_seq.push_back(t % 3 == 1);
    int32_t* slots = memory().put(std::vector<int32_t>(static_cast<size_t>(which.tokens * k), -7));
    TopKParams params{.logits = rows,
                      .end = memory().put(end),
                      .topk_indices = Tensor(indices, DType::kI32, {which.tokens, k}),
                      .topk_length = length};
    if (ops_.top_k_maps_slots) {
      params.slots = {.token_to_seq = memory().put(token_to_seq),
                      .blocks = {memory().put(table), columns, static_cast<int32_t>(columns),
                                 rows_per_block * 4},
                      .rows_per_block = rows_per_block,
                      .slots = Tensor(slots, DType::kI32, {which.tokens, k})};
    }
    ScratchLimits limits;
    limits.max_tokens = which.tokens;
    limits.max_entries = which.n;
    limits.index_topk = which.k;
    run(ops_.top_k, params, limits);
    const std::vector<int32_t> actual = memory().get(indices, which.tokens * k);
    const std::vector<int32_t> actual_length = memory().get(length, which.tokens);
    const std::vector<int32_t> actual_slots = memory().get(slots, which.tokens * k);
    for (int64_t t = 0; t < which.tokens; ++t) {
      const Vector scores(logits.begin() + t * stride, logits.begin() + t * stride + end[t]);
      std::vector<int32_t> expected = oracle::top_k(scores, which.k);
      EXPECT_EQ(actual_length[t], static_cast<int32_t>(expected.size())) << "token " << t;
      expected.resize(static_cast<size_t>(k), -1);
      const std::vector<int32_t> got(actual.begin() + t * k, actual.begin() + (t + 1) * k);
      const auto first = std::mismatch(got.begin(), got.end(), expected.begin());
      EXPECT_TRUE(first.first == got.end())
          << "token " << t << ", place " << first.first - got.begin() << ": " << *first.first
          << ", expected " << *first.second;
      for (int64_t i = 0; i < k && ops_.top_k_maps_slots; ++i) {
        const int32_t entry = expected[static_cast<size_t>(i)];
        const int64_t block =
            token_to_seq[static_cast<size_t>(t)] * columns + entry / rows_per_block;
        const int32_t slot =
            entry < 0 ? -1
                      : table[static_cast<size_t>(block)] * rows_per_block + entry % rows_per_block;
        ASSERT_EQ(actual_slots[static_cast<size_t>(t * k + i)], slot)
            << "token " << t << ", place " << i;
      }
    }
    clear_memory();
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleTopK, ::testing::ValuesIn(op_candidates("top_k")),
                         candidate_name);

class OracleMapSlots : public CandidateTest {};

TEST_P(OracleMapSlots, FollowsTheBlockTable) {
  constexpr int kTokens = 7, kTopk = 20, kColumns = 9, kRows = 64;
  Random random(6);
  const std::vector<int32_t> table = random.permutation(3 * kColumns);
  std::vector<int32_t> indices, token_to_seq;
  for (int t = 0; t < kTokens; ++t) token_to_seq.push_back(t % 3);
  for (int i = 0; i < kTokens * kTopk; ++i) {
    indices.push_back(i % 6 == 5 ? -1 : static_cast<int32_t>(random.below(kColumns * kRows)));
  }
  int32_t* slots = memory().put(std::vector<int32_t>(indices.size(), -7));
  const MapSlotsParams params{
      .topk_indices = ConstTensor(memory().put(indices), DType::kI32, {kTokens, kTopk}),
      .token_to_seq = memory().put(token_to_seq),
      .blocks = {memory().put(table), kColumns, kColumns, kRows * 4},
      .rows_per_block = kRows,
      .slots = Tensor(slots, DType::kI32, {kTokens, kTopk})};
  run(ops_.map_slots, params, {});
  const std::vector<int32_t> actual = memory().get(slots, kTokens * kTopk);
  for (size_t i = 0; i < indices.size(); ++i) {
    const int seq = token_to_seq[i / kTopk];
    const int32_t expected =  // cache_layouts.md 6
        indices[i] < 0 ? -1
                       : table[static_cast<size_t>(seq * kColumns + indices[i] / kRows)] * kRows +
                             indices[i] % kRows;
    EXPECT_EQ(actual[i], expected) << i;
  }
}

// Ranges through a block table that wraps, and padded lists, of every length; more tokens than a
// block counts at once.
TEST_P(OracleMapSlots, RaggedRowsAreTheSameWithoutPadding) {
  constexpr int kTokens = 600, kSeqs = 3, kColumns = 5, kRows = 16, kStride = 70;
  Random random(8);
  const std::vector<int32_t> table = random.permutation(kSeqs * kColumns);
  std::vector<int32_t> token_to_seq, begin, end, length, list, expected_range, expected_list;
  std::vector<int32_t> range_ptr{0}, list_ptr{0};
  for (int t = 0; t < kTokens; ++t) {
    const auto seq = static_cast<int32_t>(random.below(kSeqs));
    token_to_seq.push_back(seq);
    begin.push_back(static_cast<int32_t>(random.below(2000)));
    end.push_back(begin.back() + static_cast<int32_t>(random.below(kRows * (kColumns - 1))) -
                  (t % 7 == 0 ? 1000 : 0));  // some are empty, with an end before the begin
    for (int32_t row = begin.back(); row < end.back(); ++row) {
      const int32_t block = table[static_cast<size_t>(seq * kColumns + row / kRows % kColumns)];
      expected_range.push_back(block * kRows + row % kRows);
    }
    range_ptr.push_back(static_cast<int32_t>(expected_range.size()));
    length.push_back(t % 5 == 0 ? 0 : static_cast<int32_t>(random.below(kStride + 1)));
    for (int i = 0; i < kStride; ++i) {
      list.push_back(i % 6 == 5 ? -1 : static_cast<int32_t>(random.below(1 << 20)));
      if (i < length.back()) expected_list.push_back(list.back());
    }
    list_ptr.push_back(static_cast<int32_t>(expected_list.size()));
  }
  const auto check = [&](const std::variant<RangeRows, ListedRows>& rows,
                         const std::vector<int32_t>& ptr, const std::vector<int32_t>& expected) {
    int32_t* indptr = memory().put(std::vector<int32_t>(kTokens + 1, -7));
    int32_t* slots = memory().put(std::vector<int32_t>(expected.size() + 1, -7));
    run(ops_.ragged_rows,
        {.rows = rows,
         .token_to_seq = memory().put(token_to_seq),
         .num_tokens = kTokens,
         .indptr = indptr,
         .slots = slots},
        {});
    EXPECT_EQ(memory().get(indptr, kTokens + 1), ptr);
    std::vector<int32_t> actual = memory().get(slots, static_cast<int64_t>(expected.size()) + 1);
    EXPECT_EQ(actual.back(), -7) << "written behind the last row";
    actual.pop_back();
    EXPECT_EQ(actual, expected);
  };
  check(RangeRows{{},
                  {memory().put(table), kColumns, kColumns, kRows},
                  memory().put(begin),
                  memory().put(end)},
        range_ptr, expected_range);
  check(ListedRows{{}, memory().put(list), kStride, memory().put(length)}, list_ptr, expected_list);
  check(RangeRows{}, std::vector<int32_t>(kTokens + 1, 0), {});
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleMapSlots, ::testing::ValuesIn(op_candidates("rowwise")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
