// The operations around attention against the oracle: embedding, hyper-connections, routing,
// experts.
#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

constexpr float kEps = 1e-6f;
constexpr int kIterations = 20;

oracle::Weight as_weight(int64_t rows, int64_t cols, const Vector& values) {
  oracle::Weight out;
  out.rows = rows;
  out.cols = cols;
  out.values.assign(values.begin(), values.end());
  return out;
}

class OracleModelOps : public CandidateTest {
 protected:
  struct Hyper {
    HcWeights device;
    oracle::HyperWeights host;
  };
  Hyper make_hyper(Random& random, int64_t rows, int64_t hc, int64_t n, int64_t num_scales) {
    const auto f32 = [&](int64_t count, double scale) {
      return rounded(DType::kF32, normal_values(random, count, scale));
    };
    const Vector fn = f32(rows * hc * n, 1.0 / std::sqrt(static_cast<double>(hc * n)));
    const Vector base = f32(rows, 1.0), scale = f32(num_scales, 1.5);
    return {
        {memory().tensor(DType::kF32, {rows, hc * n}, fn),
         memory().tensor(DType::kF32, {rows}, base),
         memory().tensor(DType::kF32, {num_scales}, scale)},
        {as_weight(rows, hc * n, fn), as_weight(1, rows, base), as_weight(1, num_scales, scale)}};
  }
};

// Error of m[r] = (fn . X) / norm, before scale and base: a dot product of cols terms and the norm
// of as many (model.md 3).
double mix_error(const oracle::Matrix& streams, const oracle::Weight& fn, int64_t r) {
  double magnitude = 0, squares = 0, dot = 0;
  for (size_t k = 0; k < streams.values.size(); ++k) {
    dot += fn.row(r)[k] * streams.values[k];
    magnitude += std::abs(fn.row(r)[k] * streams.values[k]);
    squares += streams.values[k] * streams.values[k];
  }
  const auto cols = static_cast<double>(streams.values.size());
  const double norm = std::sqrt(squares / cols + kEps);
  return (gamma(cols) * magnitude + gamma(cols / 2 + 8) * std::abs(dot)) / norm;
}

// sigmoid(m * scale + base): slope at most 1/4; the exponential 2 ulp, two roundings more.
double sigmoid_error(double m_error, double m, double scale, double base) {
  const double argument =
      std::abs(scale) * m_error + gamma(2) * (std::abs(m * scale) + std::abs(base));
  return argument / 4 + gamma(8);
}

TEST_P(OracleModelOps, HyperConnections) {
  for (DType act : {DType::kBf16, DType::kF32}) {
    if (act == DType::kF32 && !exact()) continue;
    for (int64_t n : {64, 256, 4096}) {
      SCOPED_TRACE(::testing::Message() << dtype_name(act) << ", width " << n);
      constexpr int64_t kTokens = 5, kHc = 4, kRows = (2 + kHc) * kHc;
      Random random(static_cast<uint64_t>(n));
      const Vector streams = rounded(act, normal_values(random, kTokens * kHc * n, 1.0));
      const Hyper site = make_hyper(random, kRows, kHc, n, 3);
      const Tensor device_streams = memory().tensor(act, {kTokens, kHc, n}, streams);
      const Tensor y = memory().tensor(act, {kTokens, n});
      const Tensor post = memory().tensor(DType::kF32, {kTokens, kHc});
      const Tensor comb = memory().tensor(DType::kF32, {kTokens, kHc, kHc});
      ScratchLimits limits;
      limits.max_tokens = kTokens;
      limits.hidden_size = n;
      run(ops_.hc_pre,
          {.streams = device_streams,
           .weights = site.device,
           .norm_eps = kEps,
           .hc_eps = kEps,
           .sinkhorn_iters = kIterations,
           .y = y,
           .post = post,
           .comb = comb},
          limits);
      const Hyper head = make_hyper(random, kHc, kHc, n, 1);
      const Tensor head_y = memory().tensor(act, {kTokens, n});
      run(ops_.hc_head,
          {.streams = device_streams,
           .weights = head.device,
           .norm_eps = kEps,
           .hc_eps = kEps,
           .y = head_y},
          limits);
      const Vector actual_post = memory().numbers(post), actual_comb = memory().numbers(comb);
      const Vector f = rounded(act, normal_values(random, kTokens * n, 1.0));
      run(ops_.hc_post,
          {.f = memory().tensor(act, {kTokens, n}, f),
           .post = post,
           .comb = comb,
           .streams = device_streams},
          limits);

      const Vector actual_y = memory().numbers(y), actual_head = memory().numbers(head_y);
      const Vector actual_streams = memory().numbers(device_streams);
      Comparison compare_post("post [token, stream]"), compare_comb("comb [token, from, to]"),
          compare_y("y [token, element]"), compare_head("head y [token, element]"),
          compare_streams("streams [token, stream, element]");
      for (int64_t t = 0; t < kTokens; ++t) {
        oracle::Matrix x(kHc, n);
        std::copy_n(streams.begin() + t * kHc * n, kHc * n, x.values.begin());
        const oracle::HyperMix exact = oracle::hc_pre(x, site.host, kEps, kEps, kIterations);
        const auto m_of = [&](const oracle::Weight& fn, int64_t r) {
          double dot = 0, squares = 0;
          for (size_t k = 0; k < x.values.size(); ++k) {
            dot += fn.row(r)[k] * x.values[k];
            squares += x.values[k] * x.values[k];
          }
          return dot / std::sqrt(squares / static_cast<double>(x.values.size()) + kEps);
        };
        const auto pre_error = [&](const oracle::HyperWeights& w, int64_t r, int group) {
          return sigmoid_error(mix_error(x, w.fn, r), m_of(w.fn, r), w.scale.values[group],
                               w.base.values[r]);
        };
        for (int64_t i = 0; i < kHc; ++i) {
          compare_post.add({t, i}, actual_post[t * kHc + i], exact.post[i],
                           2 * pre_error(site.host, kHc + i, 1) + gamma(2));
        }
        // Logits of the combination move by at most `logit`. Normalising a positive matrix never
        // spreads relative differences (Hilbert's metric), and its row and column factors move by
        // at most as much again: a factor of 4 in all, plus 9 roundings in each of 2 * 20 passes
        // and the exponential.
        double logit = 0;
        for (int64_t k = 2 * kHc; k < kRows; ++k) {
          const double scale = std::abs(site.host.scale.values[2]);
          logit = std::max(logit, scale * mix_error(x, site.host.fn, k) +
                                      gamma(3) * (scale * std::abs(m_of(site.host.fn, k)) +
                                                  std::abs(site.host.base.values[k])));
        }
        const double relative = std::expm1(4 * 2 * logit) + gamma(9 * 2 * kIterations + 8);
        for (int64_t i = 0; i < kHc; ++i) {
          for (int64_t j = 0; j < kHc; ++j) {
            compare_comb.add({t, i, j}, actual_comb[(t * kHc + i) * kHc + j], exact.comb.row(i)[j],
                             relative * exact.comb.row(i)[j]);
          }
        }
        const Vector exact_head = oracle::hc_head(x, head.host, kEps, kEps);
        Vector y_error, head_error;  // of each stream's coefficient, which is at most 1 + eps
        for (int64_t i = 0; i < kHc; ++i) {
          y_error.push_back(pre_error(site.host, i, 0) + gamma(6));
          head_error.push_back(pre_error(head.host, i, 0) + gamma(6));
        }
        for (int64_t k = 0; k < n; ++k) {
          double slack = 0, head_slack = 0;
          for (int64_t i = 0; i < kHc; ++i) {
            slack += y_error[i] * std::abs(x.row(i)[k]);
            head_slack += head_error[i] * std::abs(x.row(i)[k]);
          }
          compare_y.add({t, k}, actual_y[t * n + k], exact.y[k],
                        slack + rounding_bound(act, exact.y[k], slack));
          compare_head.add({t, k}, actual_head[t * n + k], exact_head[k],
                           head_slack + rounding_bound(act, exact_head[k], head_slack));
        }
        // Spreading uses post and comb as the operation before left them.
        oracle::HyperMix given;
        given.post.assign(actual_post.begin() + t * kHc, actual_post.begin() + (t + 1) * kHc);
        given.comb = oracle::Matrix(kHc, kHc);
        std::copy_n(actual_comb.begin() + t * kHc * kHc, kHc * kHc, given.comb.values.begin());
        const std::span<const double> f_row = std::span(f).subspan(t * n, n);
        const oracle::Matrix spread = oracle::hc_post(f_row, given, x);
        for (int64_t j = 0; j < kHc; ++j) {
          for (int64_t k = 0; k < n; ++k) {
            double magnitude = std::abs(given.post[j] * f_row[k]);
            for (int64_t i = 0; i < kHc; ++i) {
              magnitude += std::abs(given.comb.row(i)[j] * x.row(i)[k]);
            }
            const double slack = dot_bound(kHc + 2, magnitude), value = spread.row(j)[k];
            compare_streams.add({t, j, k}, actual_streams[(t * kHc + j) * n + k], value,
                                slack + rounding_bound(act, value, slack));
          }
        }
      }
      for (const Comparison* comparison :
           {&compare_post, &compare_comb, &compare_y, &compare_head, &compare_streams}) {
        EXPECT_TRUE(comparison->result());
      }
      clear_memory();
    }
  }
}

// The same bits for a few tokens as within many: other kernels or tiles may run for them.
TEST_P(OracleModelOps, MixesOfATokenDependOnItOnly) {
  struct Case {
    DType act;
    int64_t hc, n;
  };
  for (const Case& which : {Case{DType::kBf16, 4, 640}, Case{DType::kF32, 4, 96},
                            Case{DType::kBf16, 3, 130}, Case{DType::kBf16, 1, 64}}) {
    if (which.act == DType::kF32 && !exact()) continue;
    SCOPED_TRACE(::testing::Message() << which.hc << " streams of " << which.n);
    constexpr int64_t kTokens = 43;
    const int64_t hc = which.hc, n = which.n, rows = (2 + hc) * hc;
    Random random(static_cast<uint64_t>(n));
    const ConstTensor streams =
        memory().tensor(which.act, {kTokens, hc, n},
                        rounded(which.act, normal_values(random, kTokens * hc * n, 1.0)));
    const Hyper site = make_hyper(random, rows, hc, n, 3), head = make_hyper(random, hc, hc, n, 1);
    // y, post, comb and the head's y of `count` tokens from `first` on, as bytes.
    const auto mixes = [&](int64_t first, int64_t count) {
      const Tensor y = memory().tensor(which.act, {count, n});
      const Tensor post = memory().tensor(DType::kF32, {count, hc});
      const Tensor comb = memory().tensor(DType::kF32, {count, hc, hc});
      const Tensor head_y = memory().tensor(which.act, {count, n});
      ScratchLimits limits;
      limits.max_tokens = count;
      limits.hidden_size = n;
      run(ops_.hc_pre,
          {.streams = streams.rows(first, count),
           .weights = site.device,
           .norm_eps = kEps,
           .hc_eps = kEps,
           .sinkhorn_iters = kIterations,
           .y = y,
           .post = post,
           .comb = comb},
          limits);
      run(ops_.hc_head,
          {.streams = streams.rows(first, count),
           .weights = head.device,
           .norm_eps = kEps,
           .hc_eps = kEps,
           .y = head_y},
          limits);
      std::vector<std::vector<uint8_t>> bytes;
      for (const Tensor& out : {y, post, comb, head_y}) {
        bytes.push_back(memory().get(out.as<uint8_t>(), out.num_bytes()));
      }
      return bytes;
    };
    const auto all = mixes(0, kTokens);
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {41, 2}, {5, 17}}) {
      const auto few = mixes(first, count);
      for (size_t i = 0; i < all.size(); ++i) {
        const size_t token_bytes = all[i].size() / kTokens;
        EXPECT_TRUE(std::equal(few[i].begin(), few[i].end(),
                               all[i].begin() + static_cast<int64_t>(token_bytes) * first))
            << "result " << i << ", tokens from " << first;
      }
    }
    clear_memory();
  }
}

TEST_P(OracleModelOps, EmbedCopiesRows) {
  constexpr int64_t kVocab = 50, kWidth = 96, kHc = 4;
  Random random(8);
  const std::vector<int32_t> ids{0, 49, 7, 7, 12};
  for (DType table_type : {DType::kBf16, DType::kF32}) {
    for (DType act : {DType::kBf16, DType::kF32}) {
      if (act == DType::kF32 && !exact()) continue;
      const Vector table = rounded(table_type, normal_values(random, kVocab * kWidth, 1.0));
      const auto tokens = static_cast<int64_t>(ids.size());
      const Tensor streams = memory().tensor(act, {tokens, kHc, kWidth});
      run(ops_.embed,
          {.ids = memory().put(ids),
           .table = memory().tensor(table_type, {kVocab, kWidth}, table),
           .streams = streams},
          {});
      const Vector actual = memory().numbers(streams), expected = rounded(act, table);
      for (size_t i = 0; i < actual.size(); ++i) {
        const size_t row = i / (kHc * kWidth), col = i % kWidth;
        ASSERT_EQ(actual[i], expected[static_cast<size_t>(ids[row]) * kWidth + col]) << i;
      }
      clear_memory();
    }
  }
}

TEST_P(OracleModelOps, Route) {
  constexpr int64_t kTokens = 60;
  for (const auto& [experts, k] : {std::pair<int64_t, int>{16, 4}, {256, 6}, {384, 6}, {8, 8}}) {
    Random random(static_cast<uint64_t>(experts));
    Vector logits = normal_values(random, kTokens * experts, 4.0);
    for (int64_t e = 0; e < experts; ++e) {
      logits[e] = e % 2 == 0 ? 30 : -30;  // beyond the branch of softplus; ties
    }
    logits = rounded(DType::kF32, logits);
    const Vector bias_values = rounded(DType::kF32, normal_values(random, experts, 0.3));
    const std::vector<float> bias(bias_values.begin(), bias_values.end());
    const std::vector<int32_t> token_ids(kTokens, 3);
    std::vector<int64_t> table;
    for (int i = 0; i < 10; ++i) {
      const std::vector<int32_t> order = random.permutation(static_cast<int32_t>(experts));
      table.insert(table.end(), order.begin(), order.begin() + k);
    }
    for (bool hash : {false, true}) {
      int32_t* ids = memory().put(std::vector<int32_t>(kTokens * static_cast<size_t>(k), -7));
      const Tensor weights = memory().tensor(DType::kF32, {kTokens, k});
      ScratchLimits limits;
      limits.max_tokens = kTokens;
      limits.num_experts = static_cast<int>(experts);
      limits.experts_per_token = k;
      RouteParams params{.logits = memory().tensor(DType::kF32, {kTokens, experts}, logits),
                         .bias = {},
                         .tid2eid = {},
                         .token_ids = memory().put(token_ids),
                         .scaling = 1.5f,
                         .expert_ids = Tensor(ids, DType::kI32, {kTokens, k}),
                         .expert_weights = weights};
      if (hash) {
        params.tid2eid = ConstTensor(memory().put(table), DType::kI64, {10, k});
      } else {
        params.bias = memory().tensor(DType::kF32, {experts}, bias_values);
      }
      run(ops_.route, params, limits);
      const std::vector<int32_t> actual = memory().get(ids, kTokens * k);
      const Vector actual_weights = memory().numbers(weights);
      Comparison comparison("expert weight [token, place]");
      int close_calls = 0;
      for (int64_t t = 0; t < kTokens; ++t) {
        const std::span<const double> row = std::span(logits).subspan(t * experts, experts);
        const oracle::Route exact = oracle::route(
            row, hash ? std::span<const float>() : std::span<const float>(bias),
            hash ? std::span<const int64_t>(table).subspan(3 * static_cast<size_t>(k), k)
                 : std::span<const int64_t>(),
            k, 1.5);
        const std::vector<int32_t> got(actual.begin() + t * k, actual.begin() + (t + 1) * k);
        if (got != exact.ids) {
          // Only where float cannot tell the scores apart: p is right to 8 u (exponential 2 ulp,
          // logarithm 3 ulp, root), the sum with the bias to one more.
          Vector scores;
          for (int64_t e = 0; e < experts; ++e) {
            scores.push_back(std::sqrt(row[e] > 20 ? row[e] : std::log1p(std::exp(row[e]))) +
                             bias[e]);
          }
          double worst_in = 1e300, best_out = -1e300;
          for (int32_t e : got) worst_in = std::min(worst_in, scores[e]);
          for (int32_t e : exact.ids) {
            if (std::find(got.begin(), got.end(), e) == got.end()) {
              best_out = std::max(best_out, scores[e]);
            }
          }
          EXPECT_LE(best_out - worst_in, gamma(20) * (std::abs(best_out) + 1)) << "token " << t;
          ++close_calls;
          continue;
        }
        for (int i = 0; i < k; ++i) {
          comparison.add({t, i}, actual_weights[t * k + i], exact.weights[i],
                         gamma(2 * 12 + k + 4) * exact.weights[i]);
        }
      }
      EXPECT_TRUE(comparison.result()) << experts << " experts";
      EXPECT_LE(close_calls, 1);
      clear_memory();
    }
  }
}

// On the CPU these operations belong to the row-wise family; GPUs have one of their own.
std::vector<OpCandidate> model_candidates() {
  std::vector<OpCandidate> out = op_candidates("rowwise");
  std::erase_if(out, [](const OpCandidate& one) { return one.platform != Platform::kCpu; });
  for (const OpCandidate& one : op_candidates("model_rows")) {
    if (one.platform != Platform::kCpu) out.push_back(one);
  }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleModelOps, ::testing::ValuesIn(model_candidates()),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
