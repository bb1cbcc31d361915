// linear against the oracle: every candidate, weight format, activation type and output type.
#include "tests/ops/fp8_product.h"
#include "tests/ops/oracle_testing.h"
#include "tests/ops/stored_weight.h"

namespace dsv4::testing {
namespace {

enum class Input { kPlain, kQuantise, kQuantised };

class OracleLinear : public CandidateTest {
 protected:
  // Two problems that share x, rows of x and out wider than needed.
  void check(int64_t tokens, int64_t rows, int64_t cols, DType w_type, DType x_type, DType y_type,
             Input input) {
    const bool quantise = input == Input::kQuantise;
    constexpr int64_t kGap = 16;
    Random random(11);
    Vector wide_x = rounded(x_type, normal_values(random, tokens * (cols + kGap), 1.0));
    if (input == Input::kQuantised) {
      for (int64_t t = 0; t < tokens; ++t) {
        oracle::quantise_linear_input(std::span(wide_x).subspan(
            static_cast<size_t>(t * (cols + kGap)), static_cast<size_t>(cols)));
      }
    }
    oracle::Matrix x(tokens, cols), x_abs(tokens, cols);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(wide_x.begin() + t * (cols + kGap), cols, x.row(t).begin());
      if (quantise) oracle::quantise_linear_input(x.row(t));
      for (int64_t k = 0; k < cols; ++k) x_abs.row(t)[k] = std::abs(x.row(t)[k]);
    }
    Tensor device_x = memory().tensor(x_type, {tokens, cols + kGap}, wide_x);
    device_x.shape[1] = cols;

    std::vector<StoredWeight> weights;
    std::vector<LinearProblem> problems;
    for (uint64_t i = 0; i < 2; ++i) {
      const int64_t n = i == 0 ? rows : rows / 2 + 1;
      weights.push_back(make_weight(memory(), w_type, n, cols, 100 + i));
      Tensor out = memory().tensor(y_type, {tokens, n + kGap});
      out.shape[1] = n;
      problems.push_back({device_x, weights.back().weight, out});
    }
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = cols;
    limits.max_rows = rows;
    run(ops_.linear,
        {.problems = problems,
         .quantise_input = quantise,
         .quantised_input = input == Input::kQuantised},
        limits);
    const bool fp8_sums =
        adds_on_fp8_cores(GetParam()) && w_type == DType::kF8E4M3 && input != Input::kPlain;

    for (size_t i = 0; i < problems.size(); ++i) {
      const oracle::Weight& w = weights[i].numbers;
      oracle::Weight w_abs = w;
      for (float& value : w_abs.values) value = std::abs(value);
      const oracle::Matrix exact = oracle::linear(x, w);
      const oracle::Matrix magnitude = oracle::linear(x_abs, w_abs);
      const Vector actual = memory().numbers(problems[i].out);
      Comparison comparison("linear [token, row]");
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = 0; n < w.rows; ++n) {
          // Products and additions in any order, a scale applied to each group of 32 (FP4), and
          // products below 2^-126 that count as zero.
          double slack = dot_bound(cols + cols / 32 + 8, magnitude.row(t)[n]) +
                         static_cast<double>(cols) * 0x1p-126;
          if (fp8_sums) slack += fp8_product_bound(x.row(t).data(), w.row(n).data(), cols);
          comparison.add({t, n}, actual[t * w.rows + n], exact.row(t)[n],
                         slack + rounding_bound(y_type, exact.row(t)[n], slack));
        }
      }
      EXPECT_TRUE(comparison.result());
      // What lies between the rows of out belongs to somebody else.
      const Tensor& out = problems[i].out;
      const int64_t row_bytes = out.strides[0] * size_of(y_type);
      const std::vector<uint8_t> bytes =
          memory().get(static_cast<const uint8_t*>(out.data), tokens * row_bytes);
      for (int64_t b = 0; b < tokens * row_bytes; ++b) {
        const bool between = b % row_bytes >= w.rows * size_of(y_type);
        ASSERT_TRUE(!between || bytes[b] == 0xff) << "byte " << b;
      }
    }
  }
};

TEST_P(OracleLinear, EveryFormatAgrees) {
  struct Shape {
    int64_t tokens, rows, cols;
  };
  const DType act_types[] = {DType::kBf16, DType::kF32};
  std::vector<Shape> shapes{
      {1, 130, 256}, {3, 64, 1152}, {5, 200, 128}, {37, 33, 96}, {2, 8, 4096}};
  if (emulated()) shapes = {{1, 52, 256}, {3, 24, 1184}, {37, 36, 96}, {70, 20, 160}, {2, 20, 100}};
  for (const Shape& shape : shapes) {
    for (DType w : {DType::kBf16, DType::kF32, DType::kF8E4M3, DType::kF4E2M1}) {
      if (w == DType::kF4E2M1 && shape.cols % 32 != 0) continue;
      for (DType x : act_types) {
        for (DType y : act_types) {
          for (Input input : {Input::kPlain, Input::kQuantise, Input::kQuantised}) {
            if (input != Input::kPlain && x != DType::kBf16) continue;
            SCOPED_TRACE(::testing::Message()
                         << shape.tokens << " x " << shape.rows << " x " << shape.cols << ", w "
                         << dtype_name(w) << ", x " << dtype_name(x) << ", out " << dtype_name(y)
                         << (input == Input::kQuantise    ? ", to be quantised"
                             : input == Input::kQuantised ? ", quantised before"
                                                          : ""));
            check(shape.tokens, shape.rows, shape.cols, w, x, y, input);
            clear_memory();
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleLinear, ::testing::ValuesIn(op_candidates("linear")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
