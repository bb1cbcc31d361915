// Hyper-connections against double precision (model.md 3).
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

struct Site {
  int64_t n, hidden, rows;
  Storage fn, base, scale;

  // `mix` = number of rows: (2 + n) n for a block's site, n for the head.
  Site(int64_t n_, int64_t hidden_, bool head, uint32_t seed)
      : n(n_),
        hidden(hidden_),
        rows(head ? n : (2 + n) * n),
        fn(DType::kF32, random_floats(rows * n * hidden, seed,
                                      1.0f / std::sqrt(static_cast<float>(n * hidden)))),
        base(DType::kF32, random_floats(rows, seed + 1)),
        scale(DType::kF32, random_floats(head ? 1 : 3, seed + 2)) {}
  HcWeights weights() {
    return {fn.view({rows, n * hidden}), base.view({rows}),
            scale.view({static_cast<int64_t>(scale.size())})};
  }
};

constexpr float kEps = 1e-6f;
constexpr int kIterations = 20;

struct Expected {
  std::vector<double> mix;  // after norm factor, scale and base
  std::vector<double> mix_error;
};

// Mixes of one token in double, with bounds of the f32 evaluation.
Expected mixes(const Site& site, const Storage& streams, int64_t t) {
  const int64_t cols = site.n * site.hidden;
  double squares = 0;
  for (int64_t i = 0; i < cols; ++i) {
    const double x = streams[t * cols + i];
    squares += x * x;
  }
  const double factor = 1 / std::sqrt(squares / static_cast<double>(cols) + kEps);
  Expected out;
  for (int64_t r = 0; r < site.rows; ++r) {
    double dot = 0, magnitude = 0;
    for (int64_t i = 0; i < cols; ++i) {
      const double product = double{site.fn[r * cols + i]} * streams[t * cols + i];
      dot += product;
      magnitude += std::fabs(product);
    }
    const bool head = site.rows == site.n;
    const double scale = site.scale[head ? 0 : std::min<int64_t>(r / site.n, 2)];
    out.mix.push_back(dot * factor * scale + site.base[r]);
    // Chains of at most 2048 / 16 terms, a tree of 4, cols / 2048 blocks; the factor: at most 40
    // roundings; then two products and a sum.
    const double terms = 128 + 4 + 1 + static_cast<double>(cols) / 2048;
    out.mix_error.push_back((magnitude * terms + std::fabs(dot) * 40) * factor * std::fabs(scale) *
                                kF32Eps +
                            4 * kF32Eps * std::fabs(out.mix.back()));
  }
  return out;
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

std::vector<double> sinkhorn(std::vector<double> c, size_t n) {
  const auto normalise = [&](bool rows) {
    for (size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (size_t j = 0; j < n; ++j) sum += rows ? c[i * n + j] : c[j * n + i];
      for (size_t j = 0; j < n; ++j) (rows ? c[i * n + j] : c[j * n + i]) /= sum + kEps;
    }
  };
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    const double largest = *std::max_element(c.begin() + static_cast<int64_t>(i * n),
                                             c.begin() + static_cast<int64_t>((i + 1) * n));
    for (size_t j = 0; j < n; ++j) sum += c[i * n + j] = std::exp(c[i * n + j] - largest);
    for (size_t j = 0; j < n; ++j) c[i * n + j] = c[i * n + j] / sum + kEps;
  }
  normalise(false);
  for (int k = 1; k < kIterations; ++k) {
    normalise(true);
    normalise(false);
  }
  return c;
}

struct Case {
  int64_t n, hidden, tokens;
  DType act;
};
void PrintTo(const Case& value, std::ostream* out) {
  *out << value.n << " streams of " << value.hidden << ", " << value.tokens << " tokens, "
       << (value.act == DType::kBf16 ? "bf16" : "f32");
}
class HyperConnections : public ::testing::TestWithParam<Case> {};

std::vector<std::byte> run_pre(Runner& runner, Site& site, Storage& streams, int64_t tokens,
                               DType act) {
  Storage y(act, tokens * site.hidden), post(DType::kF32, tokens * site.n);
  Storage comb(DType::kF32, tokens * site.n * site.n);
  runner.ops().hc_pre({.streams = streams.view({tokens, site.n, site.hidden}),
                       .weights = site.weights(),
                       .norm_eps = kEps,
                       .hc_eps = kEps,
                       .sinkhorn_iters = kIterations,
                       .y = y.view({tokens, site.hidden}),
                       .post = post.view({tokens, site.n}),
                       .comb = comb.view({tokens, site.n, site.n})},
                      runner.context());
  return bytes_of({&y, &post, &comb});
}

TEST_P(HyperConnections, PreMatchesDouble) {
  const int64_t n = GetParam().n, hidden = GetParam().hidden, tokens = GetParam().tokens;
  const DType act = GetParam().act;
  Site site(n, hidden, false, 20);
  Storage streams(act, random_floats(tokens * n * hidden, 30, 2.0f));
  const auto bytes = same_bytes_everywhere(
      [&](Runner& runner) { return run_pre(runner, site, streams, tokens, act); });
  size_t at = 0;
  const Storage y = read(bytes, at, act, tokens * hidden);
  const Storage post = read(bytes, at, DType::kF32, tokens * n);
  const Storage comb = read(bytes, at, DType::kF32, tokens * n * n);
  for (int64_t t = 0; t < tokens; ++t) {
    const Expected mix = mixes(site, streams, t);
    std::vector<double> pre, pre_error;
    for (int64_t i = 0; i < n; ++i) {
      const auto row = static_cast<size_t>(i);
      // |sigmoid'| <= 1/4; the function itself 3 ulp = 6 half ulps; then + hc_eps.
      pre.push_back(sigmoid(mix.mix[row]) + kEps);
      pre_error.push_back(mix.mix_error[row] / 4 + 8 * kF32Eps);
      const auto post_row = static_cast<size_t>(n + i);
      ASSERT_NEAR(post[t * n + i], 2 * sigmoid(mix.mix[post_row]),
                  mix.mix_error[post_row] / 2 + 12 * kF32Eps);
    }
    // The logarithm of C is non-expansive under a normalisation of rows or columns (max norm of
    // differences of logarithms, up to a factor 2 per pair), so an error of the logits does not
    // grow: bound by 4 x the logits' error and 2 x 20 normalisations of n + 2 roundings.
    double logit_error = 0;
    for (size_t i = static_cast<size_t>(2 * n); i < mix.mix.size(); ++i)
      logit_error = std::max(logit_error, mix.mix_error[i]);
    const std::vector<double> expected =
        sinkhorn({mix.mix.begin() + 2 * n, mix.mix.end()}, static_cast<size_t>(n));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double relative =
          4 * logit_error + 40 * (static_cast<double>(n) + 2) * kF32Eps + 10 * kF32Eps;
      ASSERT_NEAR(comb[t * n * n + static_cast<int64_t>(i)], expected[i], expected[i] * relative)
          << "token " << t << " element " << i;
    }
    for (int64_t c = 0; c < hidden; ++c) {
      double value = 0, error = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double x = streams[(t * n + i) * hidden + c];
        value += pre[static_cast<size_t>(i)] * x;
        error += std::fabs(x) * (pre_error[static_cast<size_t>(i)] +
                                 pre[static_cast<size_t>(i)] * static_cast<double>(n) * kF32Eps);
      }
      ASSERT_NEAR(y[t * hidden + c], value,
                  error + std::fabs(value) * (act == DType::kBf16 ? kBf16Eps : kF32Eps));
    }
  }
}

// Bits of a token do not depend on how many others are in the call (tiles of tokens, passes).
TEST_P(HyperConnections, PreOfATokenAloneIsTheSame) {
  const int64_t n = GetParam().n, hidden = GetParam().hidden, tokens = GetParam().tokens;
  const DType act = GetParam().act;
  Site site(n, hidden, false, 20);
  const std::vector<float> values = random_floats(tokens * n * hidden, 30, 2.0f);
  Storage streams(act, values);
  Runner runner("portable", 2);
  const std::vector<std::byte> all = run_pre(runner, site, streams, tokens, act);
  for (int64_t t = 0; t < tokens; t += 1 + tokens / 5) {
    Storage one(act, {values.begin() + t * n * hidden, values.begin() + (t + 1) * n * hidden});
    const std::vector<std::byte> alone = run_pre(runner, site, one, 1, act);
    const auto y_bytes = static_cast<size_t>(hidden * size_of(act));
    EXPECT_EQ(0, std::memcmp(alone.data(), all.data() + static_cast<size_t>(t) * y_bytes, y_bytes));
    const auto rest = static_cast<size_t>(n * n) * sizeof(float);
    EXPECT_EQ(0,
              std::memcmp(alone.data() + alone.size() - rest,
                          all.data() + all.size() - static_cast<size_t>(tokens - t) * rest, rest));
  }
}

TEST_P(HyperConnections, PostMatchesDouble) {
  const int64_t n = GetParam().n, hidden = GetParam().hidden, tokens = GetParam().tokens;
  const DType act = GetParam().act;
  Storage f(act, random_floats(tokens * hidden, 40));
  Storage post(DType::kF32, random_floats(tokens * n, 41));
  Storage comb(DType::kF32, random_floats(tokens * n * n, 42));
  const Storage before(act, random_floats(tokens * n * hidden, 43));
  const auto bytes = same_bytes_everywhere([&](Runner& runner) {
    Storage streams = before;
    runner.ops().hc_post({.f = f.view({tokens, hidden}),
                          .post = post.view({tokens, n}),
                          .comb = comb.view({tokens, n, n}),
                          .streams = streams.view({tokens, n, hidden})},
                         runner.context());
    return streams.bytes;
  });
  size_t at = 0;
  const Storage streams = read(bytes, at, act, tokens * n * hidden);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < hidden; ++c) {
        double value = double{post[t * n + j]} * f[t * hidden + c], size = std::fabs(value);
        for (int64_t i = 0; i < n; ++i) {
          const double term = double{comb[(t * n + i) * n + j]} * before[(t * n + i) * hidden + c];
          value += term;
          size += std::fabs(term);
        }
        ASSERT_NEAR(streams[(t * n + j) * hidden + c], value,
                    size * static_cast<double>(n + 1) * kF32Eps +
                        std::fabs(value) * (act == DType::kBf16 ? kBf16Eps : kF32Eps));
      }
    }
  }
}

TEST_P(HyperConnections, HeadMatchesDouble) {
  const int64_t n = GetParam().n, hidden = GetParam().hidden, tokens = GetParam().tokens;
  const DType act = GetParam().act;
  Site site(n, hidden, true, 50);
  Storage streams(act, random_floats(tokens * n * hidden, 60, 2.0f));
  const auto bytes = same_bytes_everywhere([&](Runner& runner) {
    Storage y(act, tokens * hidden);
    runner.ops().hc_head({.streams = streams.view({tokens, n, hidden}),
                          .weights = site.weights(),
                          .norm_eps = kEps,
                          .hc_eps = kEps,
                          .y = y.view({tokens, hidden})},
                         runner.context());
    return y.bytes;
  });
  size_t at = 0;
  const Storage y = read(bytes, at, act, tokens * hidden);
  for (int64_t t = 0; t < tokens; ++t) {
    const Expected mix = mixes(site, streams, t);
    for (int64_t c = 0; c < hidden; ++c) {
      double value = 0, error = 0;
      for (int64_t i = 0; i < n; ++i) {
        const auto row = static_cast<size_t>(i);
        const double x = streams[(t * n + i) * hidden + c], pre = sigmoid(mix.mix[row]) + kEps;
        value += pre * x;
        error += std::fabs(x) *
                 (mix.mix_error[row] / 4 + 8 * kF32Eps + pre * static_cast<double>(n) * kF32Eps);
      }
      ASSERT_NEAR(y[t * hidden + c], value,
                  error + std::fabs(value) * (act == DType::kBf16 ? kBf16Eps : kF32Eps));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, HyperConnections,
    ::testing::Values(Case{4, 256, 1, DType::kBf16}, Case{4, 4096, 2, DType::kBf16},
                      Case{4, 1024, 3, DType::kF32}, Case{4, 64, 131, DType::kBf16},
                      Case{2, 24, 70, DType::kF32}, Case{3, 700, 5, DType::kBf16}));

// numerics.md 5: the worked example, reached with fn = 0 so that the logits are `base`.
TEST(HyperConnectionsGolden, Sinkhorn) {
  constexpr double kExpected[16] = {
      0.3692423, 0.1387450, 0.0913641, 0.4006475, 0.0821743, 0.6201834, 0.0552705, 0.2423707,
      0.0541121, 0.0552705, 0.7310142, 0.1596021, 0.4944702, 0.1858001, 0.1223501, 0.1973787};
  Site site(4, 16, false, 1);
  std::fill(site.fn.bytes.begin(), site.fn.bytes.end(), std::byte{0});
  std::vector<float> base(24, 0.0f);
  const float logits[16] = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 1, 0, 0, -1};
  std::copy_n(logits, 16, base.begin() + 8);
  site.base = Storage(DType::kF32, base);
  Storage streams(DType::kF32, std::vector<float>(64, 1.0f));
  const auto bytes = same_bytes_everywhere(
      [&](Runner& runner) { return run_pre(runner, site, streams, 1, DType::kF32); });
  size_t at = 16 * sizeof(float);
  const Storage post = read(bytes, at, DType::kF32, 4), comb = read(bytes, at, DType::kF32, 16);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(post[i], 1.0f);  // 2 sigmoid(0)
  // The table has 7 digits; f32 adds 40 normalisations of 6 roundings at most: 1.4e-5 relative, in
  // practice far less.
  for (int i = 0; i < 16; ++i) EXPECT_NEAR(comb[i], kExpected[i], 1e-6);
}

}  // namespace
}  // namespace dsv4::cpu::testing
