// Norms, rotations, the window cache write and the quantised inverse rotation against the oracle.
#include "core/numbers.h"
#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

// Relative error of 1 / sqrt(mean(x^2) + eps) in float: the sum of n squares (half of its error,
// through the root), division, sum, root, reciprocal, and the product with it.
double norm_error(int64_t n) {
  return gamma(static_cast<double>(n) / 2 + 6);
}

constexpr float kEps = 1e-6f;
constexpr int kRopeDim = 64;

class OracleNormRope : public CandidateTest {};

TEST_P(OracleNormRope, RmsNorm) {
  Random random(1);
  for (int64_t n : {1, 7, 128, 512, 1536, 4096}) {
    for (DType x_type : {DType::kBf16, DType::kF32}) {
      if (x_type == DType::kF32 && !exact()) continue;
      for (DType w_type : {DType::kBf16, DType::kF32}) {
        for (DType y_type : {x_type, DType::kF32}) {
          constexpr int64_t kTokens = 3;
          Vector x = rounded(x_type, normal_values(random, kTokens * n, 2.0));
          std::fill_n(x.begin(), n, 0.0);  // a row of zeros: eps decides
          const Vector weight = rounded(w_type, normal_values(random, n, 1.0));
          const std::vector<float> w(weight.begin(), weight.end());
          const Tensor out = memory().tensor(y_type, {kTokens, n});
          ScratchLimits limits;
          limits.max_tokens = kTokens;
          run(ops_.rms_norm,
              {.x = memory().tensor(x_type, {kTokens, n}, x),
               .weight = memory().tensor(w_type, {n}, weight),
               .eps = kEps,
               .out = out},
              limits);
          const Vector actual = memory().numbers(out);
          Comparison comparison("rms_norm [token, element]");
          for (int64_t t = 0; t < kTokens; ++t) {
            Vector exact(x.begin() + t * n, x.begin() + (t + 1) * n);
            oracle::rms_norm(exact, w, kEps);
            for (int64_t k = 0; k < n; ++k) {
              const double slack = (norm_error(n) + gamma(1)) * std::abs(exact[k]);
              comparison.add({t, k}, actual[t * n + k], exact[k],
                             slack + rounding_bound(y_type, exact[k], slack));
            }
          }
          EXPECT_TRUE(comparison.result()) << n;
          clear_memory();
        }
      }
    }
  }
}

TEST_P(OracleNormRope, QnormRopeInsert) {
  const std::vector<float> frequencies =
      oracle::rope_frequencies({.theta = 160000, .yarn = true}, kRopeDim);
  const std::vector<int32_t> positions{0, 1, 127, 128, 4095, 65536, 1000003};
  const auto tokens = static_cast<int64_t>(positions.size());
  constexpr int64_t kDim = 512, kNope = kDim - kRopeDim;
  constexpr int kRows = 16, kBlocks = 3;
  const std::vector<int64_t> slots{5, 40, -1, 0, 47, 16, 15};
  Random random(2);
  for (KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32}) {
    if (format == KvFormat::kF32 && !exact()) continue;
    for (int64_t heads : {1, 4, 8, 64}) {
      const DType act = format == KvFormat::kF32 ? DType::kF32 : DType::kBf16;
      SCOPED_TRACE(::testing::Message() << kv_format_name(format) << ", " << heads << " heads");
      const Vector q = rounded(act, normal_values(random, tokens * heads * kDim, 3.0));
      const Vector kv = rounded(act, normal_values(random, tokens * kDim, 1.0));
      PagedCache cache(memory(), format, kDim, kRows, kBlocks);
      const Tensor device_q = memory().tensor(act, {tokens, heads, kDim}, q);
      const Tensor device_kv = memory().tensor(act, {tokens, kDim}, kv);
      ScratchLimits limits;
      limits.max_tokens = tokens;
      limits.num_heads = static_cast<int>(heads);
      limits.head_dim = kDim;
      const auto insert = [&](const Tensor& q_rows, const Tensor& kv_rows, PagedCache& into) {
        run(ops_.qnorm_rope_insert,
            {.q = q_rows,
             .kv = kv_rows,
             .rope = {memory().put(frequencies), kRopeDim},
             .eps = kEps,
             .positions = memory().put(positions),
             .slot_mapping = memory().put(slots),
             .window = into.view()},
            limits);
      };
      insert(device_q, device_kv, cache);

      const Vector actual_q = memory().numbers(device_q), actual_kv = memory().numbers(device_kv);
      Comparison compare_q("q [token, head, dim]"), compare_kv("kv [token, dim]");
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t base = (t * heads + h) * kDim;
          Vector exact(q.begin() + base, q.begin() + base + kDim);
          oracle::rms_norm(exact, {}, kEps);
          const Vector normed = exact;
          oracle::rotate_tail(exact, frequencies, positions[t]);
          for (int64_t d = 0; d < kDim; ++d) {
            const double slack =
                d < kNope
                    ? norm_error(kDim) * std::abs(exact[d])
                    : rotation_bound(normed[d & ~1], normed[d | 1]) +
                          norm_error(kDim) * (std::abs(normed[d & ~1]) + std::abs(normed[d | 1]));
            compare_q.add({t, h, d}, actual_q[base + d], exact[d],
                          slack + rounding_bound(act, exact[d], slack));
          }
        }
        Vector exact(kv.begin() + t * kDim, kv.begin() + (t + 1) * kDim);
        const Vector before = exact;
        oracle::rotate_tail(exact, frequencies, positions[t]);
        for (int64_t d = 0; d < kDim; ++d) {  // un-rotated dims keep their bits
          const double slack = d < kNope ? 0 : rotation_bound(before[d & ~1], before[d | 1]);
          compare_kv.add({t, d}, actual_kv[t * kDim + d], exact[d],
                         d < kNope ? 0 : slack + rounding_bound(act, exact[d], slack));
        }
      }
      EXPECT_TRUE(compare_q.result());
      EXPECT_TRUE(compare_kv.result());

      // The cache holds exactly what the oracle's writer makes of the row that was written back.
      cache.download();
      PagedCache expected(memory(), format, kDim, kRows, kBlocks);
      std::vector<int64_t> written;
      for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < 0) continue;
        written.push_back(slots[t]);
        expected.write(slots[t], std::span(actual_kv).subspan(static_cast<size_t>(t * kDim),
                                                              static_cast<size_t>(kDim)));
        EXPECT_EQ(cache.bytes(slots[t]), expected.bytes(slots[t])) << "slot " << slots[t];
      }
      EXPECT_TRUE(cache.only_wrote(written));

      // Without queries the same happens to kv.
      PagedCache alone(memory(), format, kDim, kRows, kBlocks);
      const Tensor kv_alone = memory().tensor(act, {tokens, kDim}, kv);
      insert({}, kv_alone, alone);
      alone.download();
      EXPECT_EQ(memory().numbers(kv_alone), actual_kv);
      for (const int64_t slot : written) EXPECT_EQ(alone.bytes(slot), cache.bytes(slot));
      EXPECT_TRUE(alone.only_wrote(written));
      clear_memory();
    }
  }
}

TEST_P(OracleNormRope, InverseRope) {
  const std::vector<float> frequencies = oracle::rope_frequencies({}, kRopeDim);
  const std::vector<int32_t> positions{0, 3, 129, 70000, 999999};
  const auto tokens = static_cast<int64_t>(positions.size());
  constexpr int64_t kDim = 512, kNope = kDim - kRopeDim, kGroup = 128;
  Random random(3);
  for (int64_t heads : {1, 4, 64}) {
    for (bool quantise : {false, true}) {
      for (DType act : {DType::kBf16, DType::kF32}) {
        if (act == DType::kF32 && (quantise || !exact())) continue;
        Vector o = rounded(act, normal_values(random, tokens * heads * kDim, 0.3));
        std::fill_n(o.begin(), kGroup, 0.0);  // an empty group: the floor decides its scale
        for (int64_t i = kGroup; i < 2 * kGroup; ++i) o[i] *= 1e-6;
        o = rounded(act, o);
        const Tensor out = memory().tensor(act, {tokens, heads, kDim});
        ScratchLimits limits;
        limits.max_tokens = tokens;
        limits.num_heads = static_cast<int>(heads);
        limits.head_dim = kDim;
        run(ops_.inverse_rope,
            {.o = memory().tensor(act, {tokens, heads, kDim}, o),
             .rope = {memory().put(frequencies), kRopeDim},
             .positions = memory().put(positions),
             .quantise = quantise,
             .out = out},
            limits);
        const Vector actual = memory().numbers(out);
        Comparison comparison("inverse_rope [token, head, dim]");
        for (int64_t row = 0; row < tokens * heads; ++row) {
          Vector exact(o.begin() + row * kDim, o.begin() + (row + 1) * kDim);
          const Vector before = exact;
          oracle::rotate_tail(exact, frequencies, positions[row / heads], -1);
          Vector delta(kDim, 0.0);
          for (int64_t d = kNope; d < kDim; ++d) {
            delta[d] = rotation_bound(before[d & ~1], before[d | 1]);
          }
          const double* result = actual.data() + row * kDim;
          if (!quantise) {
            for (int64_t d = 0; d < kDim; ++d) {
              comparison.add({row / heads, row % heads, d}, result[d], exact[d],
                             d < kNope ? 0 : delta[d] + rounding_bound(act, exact[d], delta[d]));
            }
            continue;
          }
          for (int64_t begin = 0; begin < kDim; begin += kGroup) {
            bool matches = false;  // with one exponent for the whole group
            for (int exponent : possible_exponents(std::span(exact).subspan(begin, kGroup),
                                                   std::span(delta).subspan(begin, kGroup),
                                                   oracle::kInverseRopeFloor, 448)) {
              bool all = true;
              for (int64_t d = begin; d < begin + kGroup && all; ++d) {
                all = possible_rounding(result[d], exact[d], delta[d],
                                        [&](double v) { return e4m3_value(v, exponent); });
              }
              matches = matches || all;
            }
            EXPECT_TRUE(matches) << "row " << row << ", group at dim " << begin
                                 << ": no rounding of the oracle's values gives these codes";
          }
        }
        EXPECT_TRUE(quantise || comparison.result());
        clear_memory();
      }
    }
  }
}

// Indexer queries: rotation, Hadamard, rounding to bf16, quantisation, folded weights.
TEST_P(OracleNormRope, IndexQuery) {
  const std::vector<float> frequencies =
      oracle::rope_frequencies({.theta = 160000, .yarn = true}, kRopeDim);
  const std::vector<int32_t> positions{0, 5, 4096, 900001};
  const auto tokens = static_cast<int64_t>(positions.size());
  constexpr int64_t kDim = 128, kNope = kDim - kRopeDim;
  Random random(4);
  for (KvFormat format : {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32}) {
    if (format == KvFormat::kIndexF32 && !exact()) continue;
    for (bool hadamard : {false, true}) {
      for (int64_t heads : {1, 8, 64}) {
        SCOPED_TRACE(::testing::Message() << kv_format_name(format) << ", " << heads << " heads"
                                          << (hadamard ? ", Hadamard" : ""));
        const bool exact_mode = format == KvFormat::kIndexF32;
        const DType act = exact_mode ? DType::kF32 : DType::kBf16;
        const Vector q = rounded(act, normal_values(random, tokens * heads * kDim, 2.0));
        const Vector weights = rounded(act, normal_values(random, tokens * heads, 1.0));
        const Tensor q_out = memory().tensor(act, {tokens, heads, kDim});
        const Tensor weights_out = memory().tensor(DType::kF32, {tokens, heads});
        const double factor = 1 / std::sqrt(static_cast<double>(heads * kDim));
        ScratchLimits limits;
        limits.max_tokens = tokens;
        limits.index_heads = static_cast<int>(heads);
        limits.index_dim = kDim;
        IndexQueryParams params{.q = memory().tensor(act, {tokens, heads, kDim}, q),
                                .weights = memory().tensor(act, {tokens, heads}, weights),
                                .rope = {memory().put(frequencies), kRopeDim},
                                .positions = memory().put(positions),
                                .format = format,
                                .hadamard = hadamard,
                                .q_out = q_out,
                                .weights_out = weights_out};
        run(ops_.index_query, params, limits);
        const Vector actual = memory().numbers(q_out), folded = memory().numbers(weights_out);
        if (format == KvFormat::kIndexFp8 && ops_.index_takes_e4m3) {
          const int64_t count = tokens * heads * kDim;
          const Tensor coded = memory().tensor(DType::kF8E4M3, {tokens, heads, kDim});
          params.q_out = coded;
          run(ops_.index_query, params, limits);
          const std::vector<uint8_t> codes = memory().get(coded.as<uint8_t>(), count);
          for (int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(codes[static_cast<size_t>(i)], f32_to_e4m3(static_cast<float>(actual[i])))
                << "code " << i;
          }
        }
        Comparison compare_q("index q [row, dim]"), compare_w("folded weight [row]");
        for (int64_t row = 0; row < tokens * heads; ++row) {
          Vector exact(q.begin() + row * kDim, q.begin() + (row + 1) * kDim);
          Vector delta(kDim, 0.0);
          for (int64_t d = kNope; d < kDim; ++d) {
            delta[d] = rotation_bound(exact[d & ~1], exact[d | 1]);
          }
          oracle::rotate_tail(exact, frequencies, positions[row / heads]);
          if (hadamard) {
            // 7 levels of additions and one product; all errors of the inputs add up.
            double delta_sum = 0, magnitude = 0;
            for (int64_t d = 0; d < kDim; ++d) {
              delta_sum += delta[d];
              magnitude += std::abs(exact[d]);
            }
            oracle::hadamard(exact);
            const double scale = 1 / std::sqrt(static_cast<double>(kDim));
            std::fill(delta.begin(), delta.end(), scale * (delta_sum + gamma(9) * magnitude));
          }
          const double* result = actual.data() + row * kDim;
          double weight = weights[row] * factor;
          if (exact_mode) {
            for (int64_t d = 0; d < kDim; ++d) {
              compare_q.add({row, d}, result[d], exact[d],
                            delta[d] + rounding_bound(act, exact[d], delta[d]));
            }
          } else {
            // Into bf16 first: the same argument of monotony, twice.
            Vector low(kDim), high(kDim), middle(kDim), spread(kDim);
            for (int64_t d = 0; d < kDim; ++d) {
              low[d] = oracle::round_bf16(exact[d] - delta[d]);
              high[d] = oracle::round_bf16(exact[d] + delta[d]);
              middle[d] = (low[d] + high[d]) / 2;
              spread[d] = (high[d] - low[d]) / 2;
            }
            const bool fp8 = format == KvFormat::kIndexFp8;
            const int64_t block = fp8 ? kDim : 32;
            for (int64_t begin = 0; begin < kDim; begin += block) {
              bool matches = false;
              for (int exponent :
                   possible_exponents(std::span(middle).subspan(begin, block),
                                      std::span(spread).subspan(begin, block),
                                      fp8 ? oracle::kIndexFloor : 6 * 0x1p-126, fp8 ? 448 : 6)) {
                bool all = true;
                for (int64_t d = begin; d < begin + block && all; ++d) {
                  // FP8 leaves its scale out of q and folds it into the weight.
                  const double value = fp8 ? std::ldexp(result[d], exponent) : result[d];
                  all = possible_rounding(value, middle[d], spread[d], [&](double v) {
                    return fp8 ? e4m3_value(v, exponent) : e2m1_value(v, exponent);
                  });
                }
                if (fp8 && all) {
                  const double scaled = std::ldexp(weight, exponent);
                  all = std::abs(folded[row] - scaled) <= gamma(8) * std::abs(scaled);
                }
                matches = matches || all;
              }
              EXPECT_TRUE(matches) << "row " << row << ", block at dim " << begin
                                   << ": no rounding of the oracle's values gives this";
            }
          }
          // Three products, two factors rounded, square roots.
          if (format != KvFormat::kIndexFp8) {
            compare_w.add({row}, folded[row], weight, gamma(8) * std::abs(weight));
          }
        }
        EXPECT_TRUE(!exact_mode || compare_q.result());
        EXPECT_TRUE(format == KvFormat::kIndexFp8 || compare_w.result());
        clear_memory();
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleNormRope, ::testing::ValuesIn(op_candidates("rowwise")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
