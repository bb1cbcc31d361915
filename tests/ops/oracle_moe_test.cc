// Experts against the oracle, through every candidate of the linear operation that they use.
#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

constexpr int64_t kHidden = 256, kInter = 128;
constexpr int kExperts = 6, kTopK = 3;
constexpr float kLimit = 4.0f;  // reached by some gates

struct HostExpert {
  oracle::Weight w1, w3, w2;
};

// A value with the error that float arithmetic may leave in it.
struct Bounded {
  Vector values, delta;
};

class OracleMoe : public CandidateTest {
 protected:
  // Random values in the storage of released experts (FP4) or of the shared one (FP8).
  Weight store(DType dtype, int64_t rows, int64_t cols, Random& random, oracle::Weight& numbers) {
    const bool fp4 = dtype == DType::kF4E2M1;
    const int64_t scale_cols = fp4 ? cols / 32 : (cols + 127) / 128;
    std::vector<uint8_t> bytes,
        scales(static_cast<size_t>(fp4 ? rows * scale_cols : (rows + 127) / 128 * scale_cols));
    // Codes have magnitudes of a few (FP4) or up to a hundred (FP8): results of order 1.
    for (uint8_t& scale : scales) {
      scale = static_cast<uint8_t>((fp4 ? 122 : 118) + random.below(3));
    }
    numbers.rows = rows;
    numbers.cols = cols;
    for (int64_t i = 0; i < rows * cols; ++i) {
      const int64_t r = i / cols, c = i % cols;
      const double scale = oracle::e8m0_decode(fp4 ? scales[r * scale_cols + c / 32]
                                                   : scales[r / 128 * scale_cols + c / 128]);
      const double wanted = random.normal() * (fp4 ? 2 : 12);
      const uint8_t code = fp4 ? oracle::e2m1_encode(wanted) : oracle::e4m3_encode(wanted);
      if (!fp4) {
        bytes.push_back(code);
      } else if (i % 2 == 0) {
        bytes.push_back(code);
      } else {
        bytes.back() = static_cast<uint8_t>(bytes.back() | code << 4);
      }
      numbers.values.push_back(static_cast<float>(
          scale * (fp4 ? oracle::e2m1_decode(code) : oracle::e4m3_decode(code))));
    }
    return {.dtype = dtype,
            .data = memory().put(bytes),
            .rows = rows,
            .cols = cols,
            .row_stride = cols,
            .scale = memory().put(scales),
            .scale_stride = scale_cols};
  }
  ExpertWeights make_expert(DType dtype, Random& random, HostExpert& host) {
    ExpertWeights out;
    out.w1 = store(dtype, kInter, kHidden, random, host.w1);
    out.w3 = store(dtype, kInter, kHidden, random, host.w3);
    out.w2 = store(dtype, kHidden, kInter, random, host.w2);
    return out;
  }
};

// w x with the errors of x carried along and those of the sums added (FP4 adds a scale per 32).
Bounded multiply(const oracle::Weight& w, const Bounded& x) {
  Bounded out;
  for (int64_t r = 0; r < w.rows; ++r) {
    double sum = 0, magnitude = 0, carried = 0;
    for (int64_t k = 0; k < w.cols; ++k) {
      sum += w.row(r)[k] * x.values[k];
      magnitude += std::abs(w.row(r)[k]) * (std::abs(x.values[k]) + x.delta[k]);
      carried += std::abs(w.row(r)[k]) * x.delta[k];
    }
    out.values.push_back(sum);
    out.delta.push_back(carried + dot_bound(w.cols + w.cols / 32 + 8, magnitude));
  }
  return out;
}

// model.md 4.2 with the roundings of `act` and of the quantised input of w2.
Bounded expert(const HostExpert& expert, const Vector& x, double weight, DType act, bool quantise) {
  Bounded input{x, Vector(x.size(), 0.0)};
  if (quantise) oracle::quantise_linear_input(input.values);  // x is exact: so is this
  const Bounded g = multiply(expert.w1, input), u = multiply(expert.w3, input);
  Bounded a;
  for (size_t k = 0; k < g.values.size(); ++k) {
    const double value = oracle::swiglu(g.values[k], u.values[k], kLimit) * weight;
    const double gate = std::min<double>(g.values[k], kLimit);
    const double up = std::min(std::abs(u.values[k]), double{kLimit});
    // silu has a slope of at most 1.1 and |silu(g)| <= |g|; exponential 2 ulp, four products.
    const double delta =
        weight * (1.1 * g.delta[k] * (up + u.delta[k]) + std::abs(gate) * u.delta[k]) +
        gamma(16) * std::abs(value);
    a.values.push_back(value);
    a.delta.push_back(delta);
  }
  // Rounding is monotone: the ends of the interval are rounded, the error is what is between.
  Vector low, high;
  for (size_t k = 0; k < a.values.size(); ++k) {
    low.push_back(rounded(act, {a.values[k] - a.delta[k]})[0]);
    high.push_back(rounded(act, {a.values[k] + a.delta[k]})[0]);
  }
  if (quantise) {
    constexpr size_t kBlock = 128;
    for (size_t begin = 0; begin < low.size(); begin += kBlock) {
      Vector middle, spread;
      for (size_t k = begin; k < begin + kBlock; ++k) {
        middle.push_back((low[k] + high[k]) / 2);
        spread.push_back((high[k] - low[k]) / 2);
      }
      const std::set<int> exponents = possible_exponents(middle, spread, oracle::kLinearFloor, 448);
      for (size_t k = begin; k < begin + kBlock; ++k) {
        const double from = low[k], to = high[k];
        low[k] = 1e300, high[k] = -1e300;
        for (int exponent : exponents) {
          low[k] = std::min(low[k], e4m3_value(from, exponent));
          high[k] = std::max(high[k], e4m3_value(to, exponent));
        }
      }
    }
  }
  for (size_t k = 0; k < a.values.size(); ++k) {
    a.values[k] = (low[k] + high[k]) / 2;
    a.delta[k] = (high[k] - low[k]) / 2;
  }
  return multiply(expert.w2, a);
}

TEST_P(OracleMoe, SharedAndRoutedExperts) {
  for (bool exact : {false, true}) {
    if (exact && !this->exact()) continue;
    for (bool shared : {true, false}) {
      for (int64_t tokens : {1, 2, 19, 70}) {
        if (emulated() && shared != (tokens == 2 || tokens == 70)) continue;
        SCOPED_TRACE(::testing::Message() << (exact ? "exact" : "serving") << ", " << tokens
                                          << (shared ? " tokens, shared" : " tokens"));
        const DType act = exact ? DType::kF32 : DType::kBf16;
        Random random(static_cast<uint64_t>(tokens) + 40u);
        std::vector<HostExpert> host(kExperts + 1);
        std::vector<ExpertWeights> experts;
        for (int e = 0; e < kExperts; ++e) {
          experts.push_back(make_expert(DType::kF4E2M1, random, host[static_cast<size_t>(e)]));
        }
        ExpertWeights shared_expert;
        if (shared) shared_expert = make_expert(DType::kF8E4M3, random, host[kExperts]);
        const Vector x = rounded(act, normal_values(random, tokens * kHidden, 1.0));
        std::vector<int32_t> ids;
        Vector weights;
        for (int64_t t = 0; t < tokens; ++t) {
          std::vector<int32_t> order = random.permutation(kExperts);
          order.resize(kTopK);
          std::sort(order.begin(), order.end());
          ids.insert(ids.end(), order.begin(), order.end());
          for (int k = 0; k < kTopK; ++k) weights.push_back(0.1 + 0.5 * (random.uniform() + 1));
        }
        weights = rounded(DType::kF32, weights);
        const Tensor out = memory().tensor(act, {tokens, kHidden});
        ScratchLimits limits;
        limits.max_tokens = tokens;
        limits.max_cols = kHidden;
        limits.max_rows = kHidden;
        limits.hidden_size = kHidden;
        limits.moe_intermediate = kInter;
        limits.num_experts = kExperts;
        limits.experts_per_token = kTopK;
        run(ops_.moe,
            {.x = memory().tensor(act, {tokens, kHidden}, x),
             .expert_ids = ConstTensor(memory().put(ids), DType::kI32, {tokens, kTopK}),
             .expert_weights = memory().tensor(DType::kF32, {tokens, kTopK}, weights),
             .experts = experts,
             .shared = shared_expert,
             .swiglu_limit = kLimit,
             .quantise_input = !exact,
             .out = out},
            limits);

        const Vector actual = memory().numbers(out);
        Comparison comparison("moe [token, element]");
        for (int64_t t = 0; t < tokens; ++t) {
          const Vector row(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
          Bounded sum{Vector(kHidden, 0.0), Vector(kHidden, 0.0)};
          Vector magnitude(kHidden, 0.0);
          const auto add = [&](const HostExpert& which, double weight) {
            const Bounded y = expert(which, row, weight, act, !exact);
            for (int64_t k = 0; k < kHidden; ++k) {
              sum.values[k] += y.values[k];
              sum.delta[k] += y.delta[k];
              magnitude[k] += std::abs(y.values[k]);
            }
          };
          if (shared) add(host[kExperts], 1.0);
          for (int64_t i = t * kTopK; i < (t + 1) * kTopK; ++i) {
            add(host[static_cast<size_t>(ids[static_cast<size_t>(i)])],
                weights[static_cast<size_t>(i)]);
          }
          for (int64_t k = 0; k < kHidden; ++k) {
            const double slack = sum.delta[k] + gamma(kTopK + 1) * magnitude[k];
            comparison.add({t, k}, actual[t * kHidden + k], sum.values[k],
                           slack + rounding_bound(act, sum.values[k], slack));
          }
        }
        EXPECT_TRUE(comparison.result());
        clear_memory();
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleMoe, ::testing::ValuesIn(op_candidates("linear")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
