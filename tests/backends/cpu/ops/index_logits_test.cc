// Indexer scores: every candidate against the scalar one bit by bit, the scalar one against a loop
// in double precision, and what may not change a bit.
#include "tests/backends/cpu/ops/index_logits_testing.h"

#include <cmath>
#include <string>

namespace dsv4::cpu {
namespace {

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

const Candidate& reference() {
  return index_logits_candidates().back();
}
std::vector<const Candidate*> usable() {
  std::vector<const Candidate*> list;
  for (const Candidate& c : index_logits_candidates()) {
    if (c.why_not().empty()) list.push_back(&c);
  }
  return list;
}

std::vector<float> expect_all_equal(const Case& c, const std::string& what) {
  const std::vector<float> expected = run(reference(), c.params(), 1);
  for (const Candidate* candidate : usable()) {
    for (int threads : {1, 2, 3}) {
      if (candidate == &reference() && threads < 3) continue;  // slow, and the same code
      EXPECT_TRUE(same_bits(run(*candidate, c.params(), threads), expected))
          << candidate->name << ", " << threads << " threads, " << what;
    }
  }
  return expected;
}

// Bound: with u = 2^-24 a score of D products is off by (D + 1) u sum |q k|, its weighting and the
// sum over H heads by at most (H + 6) u of the sum of |w| (|score| + its error), the key scale by
// one rounding.
void expect_sum(const Case& c, const std::vector<float>& logits) {
  const double u = 0x1p-24;
  const auto heads = static_cast<size_t>(c.options.heads), dim = static_cast<size_t>(c.options.dim);
  const auto width = static_cast<size_t>(c.max_end + 5);
  for (size_t t = 0; t < c.end.size(); ++t) {
    for (int j = 0; j < c.end[t]; ++j) {
      std::vector<float> key(dim);  // with its scale, which is a power of two
      decode_row(c.view, c.slot(c.token_to_seq[t], j), key.data());
      double sum = 0, bound = 0;
      for (size_t h = 0; h < heads; ++h) {
        double score = 0, absolute = 0;
        for (size_t d = 0; d < dim; ++d) {
          const double product = double{c.q[(t * heads + h) * dim + d]} * key[d];
          score += product;
          absolute += std::fabs(product);
        }
        const double w = c.weights[t * heads + h];
        sum += w * std::max(0.0, score);
        bound += std::fabs(w) * (static_cast<double>(dim + heads) + 8) * u * 1.01 * absolute;
      }
      ASSERT_NEAR(logits[t * width + static_cast<size_t>(j)], sum, bound)
          << "token " << t << " entry " << j;
    }
  }
}

constexpr KvFormat kFormats[] = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32};

TEST(IndexLogits, CandidatesAgreeForEveryFormatAndHeadCount) {
  Random random(1);
  for (const KvFormat format : kFormats) {
    for (const int heads : {1, 3, 8, 16, 17, 40, 64, 65, 128}) {
      CaseOptions o;
      o.format = format;
      o.heads = heads;
      o.ends = {70, 0, 33};
      o.rows_per_block = heads % 2 == 0 ? 64 : 7;
      const Case c(random, o);
      expect_sum(c, expect_all_equal(c, concat(kv_format_name(format), ", heads ", heads)));
    }
  }
}

TEST(IndexLogits, CandidatesAgreeForManyTokensAndKeys) {
  Random random(2);
  for (const KvFormat format : kFormats) {
    CaseOptions o;
    o.format = format;
    o.heads = 16;
    o.seqs = 3;
    o.ends.clear();
    for (int t = 0; t < 29; ++t) o.ends.push_back(pick(random, 0, 9) == 0 ? 0 : 30 + t / 4);
    o.ends[3] = 1200;
    const Case c(random, o);
    expect_sum(c, expect_all_equal(c, kv_format_name(format)));
  }
}

TEST(IndexLogits, OtherDims) {
  Random random(3);
  for (const KvFormat format : kFormats) {
    for (const int dim : {32, 64, 96, 256}) {
      CaseOptions o;
      o.format = format;
      o.dim = dim;
      o.heads = 5;
      const Case c(random, o);
      expect_sum(c, expect_all_equal(c, concat(kv_format_name(format), ", dim ", dim)));
    }
  }
}

// Scales at both ends of their range, codes of every kind, products below 2^-126.
TEST(IndexLogits, CandidatesAgreeForAnyFiniteBytes) {
  Random random(4);
  for (const KvFormat format : kFormats) {
    for (int round = 0; round < 4; ++round) {
      CaseOptions o;
      o.format = format;
      o.heads = 9;
      o.magnitude = round == 3 ? 1e-22f : 1.0f;
      Case c(random, o);
      for (int seq = 0; seq < o.seqs; ++seq) {
        for (int j = 0; j < c.max_end; ++j) {
          if (j / 64 >= c.columns) continue;
          const RowAddress row = row_address(c.view, c.slot(seq, j));
          const RowLayout layout = row_layout(format, o.dim);
          if (format != KvFormat::kIndexF32) {
            for (int64_t i = 0; i < layout.value_bytes; ++i) {
              const int code = pick(random, 0, 255);
              const bool nan = format == KvFormat::kIndexFp8 && (code & 0x7f) == 0x7f;
              row.values[i] = std::byte{static_cast<unsigned char>(nan ? 0 : code)};
            }
          }
          if (format == KvFormat::kIndexMxfp4) {
            for (int64_t i = 0; i < layout.scale_bytes; ++i) {
              const int near = pick(random, 0, 5), any = pick(random, 0, 200);
              row.scales[i] = std::byte{static_cast<unsigned char>(round == 0 ? near : any)};
            }
          } else if (format == KvFormat::kIndexFp8) {
            const float scale = std::ldexp(1.0f, pick(random, -149, 100));
            std::memcpy(row.scales, &scale, 4);
          }
        }
      }
      expect_all_equal(c, concat(kv_format_name(format), ", round ", round));
    }
  }
}

// Integers replace f32 sums only where both are exact: scales of a head and of a key on both sides
// of that limit, groups of zeros with any scale, queries that are no E2M1 values.
TEST(IndexLogits, CandidatesAgreeAroundTheReachOfIntegers) {
  Random random(8);
  for (const int q_spread : {0, 4, 5, 6, 12}) {
    for (const int key_spread : {0, 3, 4, 5, 20}) {
      for (const bool arbitrary_q : {false, true}) {
        CaseOptions o;
        o.format = KvFormat::kIndexMxfp4;
        o.heads = 20;
        o.ends = {66, 67, 130};
        Case c(random, o);
        int exponent = 0;  // one a group, so that a head has codes
        for (size_t i = 0; i < c.q.size(); ++i) {
          const size_t group = i / 32;
          if (i % 32 == 0) exponent = group % 4 == 0 ? q_spread : pick(random, 0, q_spread);
          const float code = e2m1_to_f32(f32_to_e2m1(uniform(random, 6.5f)));
          c.q[i] = group % 7 == 5 ? 0.0f : std::ldexp(code, (group % 4 == 3 ? 0 : exponent) - 20);
          if (arbitrary_q && i % 1000 == 17)
            c.q[i] = bf16_to_f32(f32_to_bf16(uniform(random, 1.0f)));
          c.q_bf16[i] = f32_to_bf16(c.q[i]);
        }
        for (int seq = 0; seq < o.seqs; ++seq) {
          for (int j = 0; j < c.max_end; ++j) {
            if (j / 64 >= c.columns) continue;
            const RowAddress row = row_address(c.view, c.slot(seq, j));
            for (int g = 0; g < 4; ++g) {
              int scale = 120 + (g == 2 ? 0 : g == 1 ? key_spread : pick(random, 0, key_spread));
              // One key beyond the limit: the other blocks of keys stay integers.
              if (key_spread > 4 && j != 5) scale = 120 + g;
              for (int i = 0; i < 16; ++i) {
                const bool zero = j % 5 == 3 && g == j % 4;
                row.values[16 * g + i] =
                    std::byte{static_cast<unsigned char>(zero ? 0x80 : pick(random, 0, 255))};
                if (zero) scale = pick(random, 0, 254);
              }
              row.scales[g] = std::byte{static_cast<unsigned char>(scale)};
            }
          }
        }
        expect_sum(c, expect_all_equal(c, concat("query spread ", q_spread, ", key spread ",
                                                 key_spread, ", arbitrary ", arbitrary_q)));
      }
    }
  }
}

TEST(IndexLogits, NanKeysStayVisible) {
  Random random(5);
  for (const KvFormat format : kFormats) {
    CaseOptions o;
    o.format = format;
    o.ends = {40};
    o.seqs = 1;
    Case c(random, o);
    const RowAddress row = row_address(c.view, c.slot(0, 17));
    const RowLayout layout = row_layout(format, o.dim);
    std::fill_n(row.values, layout.value_bytes, std::byte{0x7f});
    std::fill_n(row.scales, layout.scale_bytes, std::byte{0xff});
    if (format == KvFormat::kIndexF32) {
      const float nan = NAN;
      std::memcpy(row.values, &nan, 4);
    }
    for (const Candidate* candidate : usable()) {
      const std::vector<float> logits = run(*candidate, c.params(), 1);
      for (size_t j = 0; j < 40; ++j) {
        EXPECT_EQ(std::isnan(logits[j]), j == 17) << candidate->name << " entry " << j;
      }
    }
  }
}

TEST(IndexLogits, TokenAloneGivesTheBitsItHasInABatch) {
  Random random(6);
  CaseOptions o;
  o.ends = {200, 201, 201, 1, 90, 300, 64};
  const Case c(random, o);
  for (const Candidate* candidate : usable()) {
    const std::vector<float> all = run(*candidate, c.params(), 2);
    const auto width = static_cast<size_t>(c.max_end + 5);
    for (size_t t = 0; t < o.ends.size(); ++t) {
      IndexLogitsParams p = c.params();
      p.q = p.q.rows(static_cast<int64_t>(t), 1);
      p.weights = p.weights.rows(static_cast<int64_t>(t), 1);
      p.token_to_seq += t;
      p.end += t;
      const std::vector<float> alone = run(*candidate, p, 3);
      EXPECT_EQ(std::memcmp(alone.data(), all.data() + t * width, width * 4), 0)
          << candidate->name << " token " << t;
    }
  }
}

TEST(IndexLogits, MeasuringTouchesNothing) {
  Random random(7);
  const Case c(random, CaseOptions{});
  for (const Candidate* candidate : usable()) {
    Ops ops;
    candidate->install(ops);
    Arena measuring;
    IndexLogitsParams p = c.params();
    p.q.data = p.weights.data = nullptr;
    p.end = p.token_to_seq = nullptr;
    ops.index_logits(p, OpContext{Stream{}, &measuring, &ops});
    ScratchLimits limits;
    limits.max_tokens = 3;
    limits.index_heads = 64;
    limits.index_dim = 128;
    EXPECT_GT(measuring.peak(), 0);
    EXPECT_LE(measuring.peak(), index_logits_scratch_bytes(limits)) << candidate->name;
  }
}

}  // namespace
}  // namespace dsv4::cpu
