// Experts: against double precision, and bit for bit against the plain loop over tokens and experts
// with one linear call each, in every number format.
#include "backends/cpu/ops/rowwise_kernels.h"
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

// A weight matrix with its memory.
struct Matrix {
  Storage values;
  std::vector<uint8_t> codes, scales;
  Weight weight;

  Matrix(DType dtype, int64_t rows, int64_t cols, uint32_t seed) {
    const float size = 1.0f / std::sqrt(static_cast<float>(cols));
    weight.dtype = dtype;
    weight.rows = rows;
    weight.cols = weight.row_stride = cols;
    std::mt19937 generator(seed);
    if (dtype == DType::kF32 || dtype == DType::kBf16) {
      values = Storage(dtype, random_floats(rows * cols, seed, size));
      weight.data = values.bytes.data();
    } else if (dtype == DType::kF8E4M3) {
      for (float value : random_floats(rows * cols, seed, size * 16))
        codes.push_back(f32_to_e4m3(value));
      weight.scale_stride = (cols + 127) / 128;
      for (int64_t i = 0; i < (rows + 127) / 128 * weight.scale_stride; ++i)
        scales.push_back(static_cast<uint8_t>(122 + generator() % 3));
      weight.data = codes.data();
      weight.scale = scales.data();
    } else {
      for (int64_t i = 0; i < rows * cols / 2; ++i)
        codes.push_back(static_cast<uint8_t>(generator()));
      weight.scale_stride = cols / 32;
      for (int64_t i = 0; i < rows * weight.scale_stride; ++i)
        scales.push_back(static_cast<uint8_t>(121 + generator() % 3));
      weight.data = codes.data();
      weight.scale = scales.data();
    }
  }
  double at(int64_t row, int64_t col) const { return values[row * weight.cols + col]; }
};

struct Expert {
  Matrix w1, w3, w2;
  Expert(DType dtype, int64_t hidden, int64_t inter, uint32_t seed)
      : w1(dtype, inter, hidden, seed),
        w3(dtype, inter, hidden, seed + 1),
        w2(dtype, hidden, inter, seed + 2) {}
  ExpertWeights weights() const { return {w1.weight, w3.weight, w2.weight}; }
};

struct Case {
  const char* name;
  DType routed, shared, act;
  bool quantise;
  int64_t tokens, hidden, inter, experts, k;
  bool has_shared;
};
std::ostream& operator<<(std::ostream& out, const Case& value) {
  return out << value.name;
}

class Moe : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr float kLimit = 1.0f;  // low, so that both clamps act

  Moe()
      : case_(GetParam()),
        shared_(case_.shared, case_.hidden, case_.inter, 5),
        x_(case_.act, random_floats(case_.tokens * case_.hidden, 1)),
        expert_weights_(DType::kF32, case_.tokens * case_.k) {
    for (int64_t e = 0; e < case_.experts; ++e)
      experts_.emplace_back(case_.routed, case_.hidden, case_.inter,
                            100 + 3 * static_cast<uint32_t>(e));
    for (const Expert& expert : experts_) views_.push_back(expert.weights());
    std::mt19937 generator(9);
    for (int64_t t = 0; t < case_.tokens; ++t) {
      // Expert 0 is popular, the last one is never chosen.
      std::vector<int32_t> ids;
      for (int32_t e = 0; e + 1 < case_.experts; ++e) ids.push_back(e);
      std::shuffle(ids.begin() + (t % 3 == 0 ? 1 : 0), ids.end(), generator);
      ids.resize(static_cast<size_t>(case_.k));
      std::sort(ids.begin(), ids.end());
      ids_.insert(ids_.end(), ids.begin(), ids.end());
    }
    const std::vector<float> weights = random_floats(case_.tokens * case_.k, 10, 0.3f);
    expert_weights_ = Storage(DType::kF32, weights);
  }

  static void add_linear(Runner& runner) { linear_candidates().back().install(runner.ops()); }

  Storage run(Runner& runner) {
    add_linear(runner);
    Storage out(case_.act, case_.tokens * case_.hidden);
    MoeParams params{.x = x_.view({case_.tokens, case_.hidden}),
                     .expert_ids = Tensor(ids_.data(), DType::kI32, {case_.tokens, case_.k}),
                     .expert_weights = expert_weights_.view({case_.tokens, case_.k}),
                     .experts = views_,
                     .shared = {},
                     .swiglu_limit = kLimit,
                     .quantise_input = case_.quantise,
                     .out = out.view({case_.tokens, case_.hidden})};
    if (case_.has_shared) params.shared = shared_.weights();
    runner.ops().moe(params, runner.context());
    return out;
  }

  // One expert on one row, by the same operations: [hidden] f32.
  std::vector<float> apply(Runner& runner, const ExpertWeights& expert, Tensor row, float weight) {
    const int64_t inter = case_.inter;
    Storage g(DType::kF32, inter), u(DType::kF32, inter), a(case_.act, inter);
    Storage y(DType::kF32, case_.hidden);
    const auto linear = [&](const ConstTensor& x, const Weight& w, Tensor out) {
      const LinearProblem problem{x, w, out};
      runner.ops().linear({.problems = {&problem, 1}, .quantise_input = case_.quantise},
                          runner.context());
    };
    linear(row, expert.w1, g.view({1, inter}));
    linear(row, expert.w3, u.view({1, inter}));
    best_row_kernels().swiglu(reinterpret_cast<const float*>(g.bytes.data()),
                              reinterpret_cast<const float*>(u.bytes.data()), kLimit, weight, inter,
                              a.bytes.data(), case_.act);
    linear(a.view({1, inter}), expert.w2, y.view({1, case_.hidden}));
    const auto* values = reinterpret_cast<const float*>(y.bytes.data());
    return {values, values + case_.hidden};
  }

  Case case_;
  Expert shared_;
  std::vector<Expert> experts_;
  std::vector<ExpertWeights> views_;
  Storage x_, expert_weights_;
  std::vector<int32_t> ids_;
};

TEST_P(Moe, EqualsThePlainLoop) {
  const auto bytes = same_bytes_everywhere([&](Runner& runner) { return run(runner).bytes; });
  size_t at = 0;
  const Storage out = read(bytes, at, case_.act, case_.tokens * case_.hidden);
  Runner runner("portable", 2);
  add_linear(runner);
  for (int64_t t = 0; t < case_.tokens; t += 1 + case_.tokens / 7) {
    const Tensor row = x_.view({case_.tokens, case_.hidden}).rows(t, 1);
    std::vector<float> sum(static_cast<size_t>(case_.hidden), 0.0f);
    const auto add = [&](const ExpertWeights& expert, float weight) {
      const std::vector<float> y = apply(runner, expert, row, weight);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += y[i];
    };
    if (case_.has_shared) add(shared_.weights(), 1.0f);
    for (int64_t i = 0; i < case_.k; ++i) {
      add(views_[static_cast<size_t>(ids_[static_cast<size_t>(t * case_.k + i)])],
          expert_weights_[t * case_.k + i]);
    }
    const Storage expected(case_.act, sum);
    for (int64_t i = 0; i < case_.hidden; ++i)
      ASSERT_EQ(out[t * case_.hidden + i], expected[i]) << "token " << t << " column " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, Moe,
    ::testing::Values(
        Case{"fp4_batch", DType::kF4E2M1, DType::kF8E4M3, DType::kBf16, true, 40, 128, 128, 9, 4,
             true},
        Case{"fp4_one_token", DType::kF4E2M1, DType::kF8E4M3, DType::kBf16, true, 1, 256, 128, 9, 6,
             true},
        Case{"fp8", DType::kF8E4M3, DType::kF8E4M3, DType::kBf16, true, 7, 128, 256, 5, 2, true},
        Case{"bf16", DType::kBf16, DType::kBf16, DType::kBf16, false, 13, 96, 64, 6, 3, true},
        Case{"f32", DType::kF32, DType::kF32, DType::kF32, false, 13, 48, 32, 6, 3, true},
        Case{"no_shared", DType::kF32, DType::kF32, DType::kF32, false, 5, 48, 32, 6, 3, false},
        // More rows than a group and more tokens than a tile hold; more experts than a group.
        Case{"many_tokens", DType::kF32, DType::kF32, DType::kF32, false, 2100, 16, 16, 4, 2, true},
        Case{"many_experts", DType::kF32, DType::kF32, DType::kF32, false, 200, 16, 16, 300, 3,
             true}),
    [](const ::testing::TestParamInfo<Case>& info) { return std::string(info.param.name); });

// f32 throughout, against double.
TEST(MoeExact, MatchesDouble) {
  constexpr int64_t kTokens = 6, kHidden = 40, kInter = 24, kExperts = 4, kTop = 2;
  constexpr float kLimit = 0.5f;
  std::vector<Expert> experts;
  std::vector<ExpertWeights> views;
  for (uint32_t e = 0; e < kExperts; ++e)
    experts.emplace_back(DType::kF32, kHidden, kInter, 10 * e);
  for (const Expert& expert : experts) views.push_back(expert.weights());
  const Expert shared(DType::kF32, kHidden, kInter, 77);
  Storage x(DType::kF32, random_floats(kTokens * kHidden, 1));
  std::vector<int32_t> ids{0, 1, 2, 3, 0, 3, 1, 2, 0, 2, 1, 3};
  Storage weights(DType::kF32, random_floats(kTokens * kTop, 2));
  Runner runner("portable", 2);
  linear_candidates().back().install(runner.ops());
  Storage out(DType::kF32, kTokens * kHidden);
  runner.ops().moe({.x = x.view({kTokens, kHidden}),
                    .expert_ids = Tensor(ids.data(), DType::kI32, {kTokens, kTop}),
                    .expert_weights = weights.view({kTokens, kTop}),
                    .experts = views,
                    .shared = shared.weights(),
                    .swiglu_limit = kLimit,
                    .quantise_input = false,
                    .out = out.view({kTokens, kHidden})},
                   runner.context());
  bool clamped_low = false, gate_below = false;
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> sum(kHidden), bound(kHidden);
    const auto add = [&](const Expert& expert, double weight) {
      std::vector<double> a(kInter), a_error(kInter);
      for (int64_t i = 0; i < kInter; ++i) {
        double g = 0, u = 0, g_size = 0, u_size = 0;
        for (int64_t c = 0; c < kHidden; ++c) {
          const double value = x[t * kHidden + c];
          g += value * expert.w1.at(i, c);
          u += value * expert.w3.at(i, c);
          g_size += std::fabs(value * expert.w1.at(i, c));
          u_size += std::fabs(value * expert.w3.at(i, c));
        }
        clamped_low = clamped_low || u < -kLimit;
        gate_below = gate_below || g < -kLimit;
        g = std::min(g, double{kLimit});  // no lower clamp (model.md 4.2)
        u = std::clamp(u, -double{kLimit}, double{kLimit});
        const double silu = g / (1 + std::exp(-g));
        const auto row = static_cast<size_t>(i);
        a[row] = silu * u * weight;
        // |silu'| <= 1.1; sigmoid 6 half ulps, three products.
        a_error[row] = std::fabs(weight) * kF32Eps *
                       (1.1 * (kHidden + 1) * g_size * std::fabs(u) +
                        std::fabs(silu) * (kHidden + 1) * u_size + 10 * std::fabs(silu * u));
      }
      for (int64_t c = 0; c < kHidden; ++c) {
        const auto col = static_cast<size_t>(c);
        double y = 0;
        for (int64_t i = 0; i < kInter; ++i) {
          const auto row = static_cast<size_t>(i);
          const double product = a[row] * expert.w2.at(c, i);
          y += product;
          bound[col] += std::fabs(product) * (kInter + 1) * kF32Eps +
                        a_error[row] * std::fabs(expert.w2.at(c, i));
        }
        bound[col] += std::fabs(y) * (kTop + 1) * kF32Eps;
        sum[col] += y;
      }
    };
    add(shared, 1.0);
    for (int64_t i = 0; i < kTop; ++i)
      add(experts[static_cast<size_t>(ids[static_cast<size_t>(t * kTop + i)])],
          weights[t * kTop + i]);
    for (int64_t c = 0; c < kHidden; ++c) {
      ASSERT_NEAR(out[t * kHidden + c], sum[static_cast<size_t>(c)], bound[static_cast<size_t>(c)])
          << "token " << t << " column " << c;
    }
  }
  EXPECT_TRUE(clamped_low && gate_below) << "the inputs do not reach the clamps";
}

// The scratch bound holds for the arena that the model sizes with it.
TEST(MoeScratch, BoundCoversACall) {
  ScratchLimits limits;
  limits.max_tokens = 50;
  limits.max_cols = 64;
  limits.max_rows = 64;
  limits.hidden_size = 64;
  limits.moe_intermediate = 32;
  limits.num_experts = 6;
  limits.experts_per_token = 3;
  limits.num_threads = 2;
  std::vector<std::byte> memory(static_cast<size_t>(moe_scratch_bytes(limits)));
  Arena arena(memory.data(), static_cast<int64_t>(memory.size()));
  std::vector<Expert> experts;
  std::vector<ExpertWeights> views;
  for (uint32_t e = 0; e < 6; ++e) experts.emplace_back(DType::kF32, 64, 32, 10 * e);
  for (const Expert& expert : experts) views.push_back(expert.weights());
  Storage x(DType::kF32, random_floats(50 * 64, 1)), weights(DType::kF32, random_floats(150, 2));
  std::vector<int32_t> ids;
  for (int t = 0; t < 50; ++t) ids.insert(ids.end(), {t % 2, 2 + t % 2, 4 + t % 2});
  Runner runner("portable", 2);
  linear_candidates().back().install(runner.ops());
  Storage out(DType::kF32, 50 * 64);
  OpContext context = runner.context();
  context.scratch = &arena;
  EXPECT_NO_THROW(runner.ops().moe({.x = x.view({50, 64}),
                                    .expert_ids = Tensor(ids.data(), DType::kI32, {50, 3}),
                                    .expert_weights = weights.view({50, 3}),
                                    .experts = views,
                                    .shared = views[0],
                                    .swiglu_limit = 10.0f,
                                    .quantise_input = false,
                                    .out = out.view({50, 64})},
                                   context));
}

}  // namespace
}  // namespace dsv4::cpu::testing
