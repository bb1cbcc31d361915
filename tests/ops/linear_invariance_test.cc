// linear: the bits of a row of out depend on its row of x only, not on the other rows, how many
// there are (kernels for few and for many), where they lie, or the other problems of the call.
#include <limits>
#include <span>

#include "tests/ops/oracle_testing.h"
#include "tests/ops/stored_weight.h"

namespace dsv4::testing {
namespace {

// Of the largest call, and parts of it: all kernels that a number of tokens may choose.
struct Part {
  int64_t begin, count;
};
const std::vector<Part> kParts{{0, 200}, {0, 1},    {199, 1},  {29, 1},   {5, 2},
                               {3, 8},   {12, 17},  {64, 16},  {100, 17}, {11, 40},
                               {1, 64},  {30, 100}, {70, 129}, {40, 9}};
const std::vector<Part> kEmulatedParts{{0, 80}, {79, 1}, {3, 8}, {20, 17}, {1, 64}};

class LinearInvariance : public CandidateTest {
 protected:
  // out of rows [begin, begin + count) of x as bytes, the first of `weights` computed last of all
  // problems.
  std::vector<uint8_t> multiply(const Tensor& x, int64_t begin, int64_t count,
                                const std::vector<Weight>& weights, bool quantise,
                                int64_t scores_beside = 0) {
    std::vector<LinearProblem> problems;
    for (size_t i = weights.size(); i-- > 0;) {
      problems.push_back({x.rows(begin, count), weights[i],
                          memory().tensor(DType::kF32, {count, weights[i].rows})});
    }
    ScratchLimits limits;
    limits.max_tokens = count;
    limits.max_cols = x.shape[1];
    limits.max_rows = weights[0].rows;
    run(ops_.linear,
        {.problems = problems, .quantise_input = quantise, .scores_beside = scores_beside}, limits);
    const Tensor& out = problems.back().out;
    return memory().get(out.as<uint8_t>(), out.num_bytes());
  }

  void check(int64_t rows, int64_t cols, DType w_type, DType x_type, bool quantise) {
    Random random(5);
    const std::vector<Part>& parts = emulated() ? kEmulatedParts : kParts;
    const int64_t tokens = is_scalar() ? 30 : parts[0].count;
    const Tensor x = memory().tensor(x_type, {tokens, cols},
                                     rounded(x_type, normal_values(random, tokens * cols, 1.0)));
    const std::vector<Weight> weights{make_weight(memory(), w_type, rows, cols, 7).weight,
                                      make_weight(memory(), w_type, 40, cols, 8).weight,
                                      make_weight(memory(), DType::kBf16, 33, cols, 9).weight};
    const std::vector<uint8_t> all = multiply(x, 0, tokens, {weights[0]}, quantise);
    const auto row_bytes = static_cast<size_t>(rows) * sizeof(float);
    for (const Part& part : std::span(parts).subspan(1)) {
      if (part.begin + part.count > tokens) continue;
      for (size_t problems : {size_t{1}, weights.size()}) {
        if (emulated() && problems > 1 && part.count != 8) continue;
        const std::vector<uint8_t> some =
            multiply(x, part.begin, part.count,
                     {weights.begin(), weights.begin() + static_cast<int64_t>(problems)}, quantise);
        for (int64_t t = 0; t < part.count; ++t) {
          ASSERT_EQ(
              std::memcmp(some.data() + static_cast<size_t>(t) * row_bytes,
                          all.data() + static_cast<size_t>(part.begin + t) * row_bytes, row_bytes),
              0)
              << "row " << part.begin + t << " in a call of " << part.count << " rows and "
              << problems << " problems";
        }
      }
    }
  }
};

TEST_P(LinearInvariance, RowsAloneAndTogether) {
  struct Shape {
    int64_t rows, cols;
  };
  std::vector<Shape> shapes{{130, 96}, {72, 1152}, {48, 4096}, {16, 7168}};
  if (emulated()) shapes = {{52, 96}, {20, 1152}, {16, 2080}};
  for (const Shape& shape : shapes) {
    for (DType w : {DType::kBf16, DType::kF32, DType::kF8E4M3, DType::kF4E2M1}) {
      for (DType x : {DType::kBf16, DType::kF32}) {
        for (bool quantise : {false, true}) {
          if (quantise && x != DType::kBf16) continue;
          if (emulated() && x == DType::kF32 && w != DType::kBf16) continue;
          SCOPED_TRACE(::testing::Message()
                       << shape.rows << " x " << shape.cols << ", w " << dtype_name(w) << ", x "
                       << dtype_name(x) << (quantise ? ", quantised" : ""));
          check(shape.rows, shape.cols, w, x, quantise);
          clear_memory();
        }
      }
    }
  }
}

// Rows enough that CUDA computes whole tiles, every block all of K, where a call has many tokens.
TEST_P(LinearInvariance, ManyRowsAloneAndTogether) {
  if (GetParam().platform != Platform::kCuda) GTEST_SKIP() << "one way for any number of rows";
  for (DType w : {DType::kBf16, DType::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(w));
    check(6500, 4112, w, DType::kBf16, w == DType::kF8E4M3);
    clear_memory();
  }
  // Few tiles with all segments, and more tiles than multiprocessors with an odd number of them.
  for (const auto& [rows, cols] : {std::pair{4000, 4112}, std::pair{17000, 1100}}) {
    SCOPED_TRACE(::testing::Message() << rows << " x " << cols);
    check(rows, cols, DType::kF8E4M3, DType::kBf16, true);
    clear_memory();
  }
}

// Calls of many codes take other kernels for few tokens than a call of one of their weights.
TEST_P(LinearInvariance, CallsOfManyCodes) {
  if (GetParam().platform != Platform::kCuda) GTEST_SKIP() << "one way for any number of codes";
  constexpr int64_t kRows = 4096, kCols = 1024, kTokens = 20;
  constexpr size_t kManyCodes = 16;  // problems with 2^26 codes
  Random random(14);
  const Tensor x =
      memory().tensor(DType::kBf16, {kTokens, kCols},
                      rounded(DType::kBf16, normal_values(random, kTokens * kCols, 1.0)));
  const Weight weight = make_weight(memory(), DType::kF8E4M3, kRows, kCols, 15).weight;
  const std::vector<uint8_t> all = multiply(x, 0, kTokens, {weight}, true);
  for (const Part& part :
       {Part{0, 1}, Part{19, 1}, Part{4, 2}, Part{7, 5}, Part{9, 8}, Part{2, 17}}) {
    const std::vector<uint8_t> some =
        multiply(x, part.begin, part.count, std::vector<Weight>(kManyCodes, weight), true);
    ASSERT_EQ(std::memcmp(some.data(), all.data() + part.begin * kRows * 4,
                          static_cast<size_t>(part.count * kRows) * sizeof(float)),
              0)
        << part.count << " tokens from " << part.begin;
  }
}

// A call that leaves a part of the device to others takes other kernels and grids.
TEST_P(LinearInvariance, BesideOthers) {
  const int64_t rows = GetParam().platform == Platform::kCuda ? 17000 : 40, cols = 1024;
  const int64_t tokens = emulated() ? 5 : 20;
  Random random(16);
  const Tensor x = memory().tensor(DType::kBf16, {tokens, cols},
                                   rounded(DType::kBf16, normal_values(random, tokens * cols, 1)));
  for (DType w : {DType::kBf16, DType::kF8E4M3}) {
    const Weight weight = make_weight(memory(), w, rows, cols, 17).weight;
    for (int64_t count : {int64_t{1}, int64_t{4}, tokens}) {
      const bool quantise = w == DType::kF8E4M3;
      const auto alone = multiply(x, 0, count, {weight}, quantise);
      for (int64_t scores_beside : {1, 1 << 20}) {
        EXPECT_EQ(multiply(x, 0, count, {weight}, quantise, scores_beside), alone)
            << dtype_name(w) << ", " << count << " tokens, " << scores_beside << " scores beside";
      }
    }
  }
}

// The groups of wo_a: problems whose x are neighbouring columns of one matrix, quantised before.
TEST_P(LinearInvariance, ColumnsOfOneMatrix) {
  constexpr int64_t kGroups = 3, kRows = 40, kCols = 1152;
  Random random(12);
  for (int64_t tokens : {int64_t{1}, int64_t{5}, int64_t{emulated() ? 70 : 150}}) {
    Vector values = rounded(DType::kBf16, normal_values(random, tokens * kGroups * kCols, 1.0));
    for (int64_t t = 0; t < tokens; ++t) {
      oracle::quantise_linear_input(std::span(values).subspan(
          static_cast<size_t>(t * kGroups * kCols), static_cast<size_t>(kGroups * kCols)));
    }
    const Tensor x = memory().tensor(DType::kBf16, {tokens, kGroups * kCols}, values);
    std::vector<LinearProblem> problems;
    std::vector<Tensor> alone;
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = kCols;
    limits.max_rows = kRows;
    limits.num_heads = kGroups;
    limits.head_dim = kCols;
    for (int64_t g = 0; g < kGroups; ++g) {
      Tensor columns = x;
      columns.data = x.as<uint16_t>() + g * kCols;
      columns.shape[1] = kCols;
      const Weight weight =
          make_weight(memory(), DType::kF8E4M3, kRows, kCols, 30 + static_cast<uint64_t>(g)).weight;
      alone.push_back(memory().tensor(DType::kF32, {tokens, kRows}));
      const LinearProblem one{columns, weight, alone.back()};
      run(ops_.linear, {.problems = {&one, 1}, .quantised_input = true}, limits);
      problems.push_back({columns, weight, memory().tensor(DType::kF32, {tokens, kRows})});
    }
    run(ops_.linear, {.problems = problems, .quantised_input = true}, limits);
    for (size_t g = 0; g < kGroups; ++g) {
      const Tensor& out = problems[g].out;
      ASSERT_EQ(memory().get(out.as<uint8_t>(), out.num_bytes()),
                memory().get(alone[g].as<uint8_t>(), out.num_bytes()))
          << "group " << g << " of " << tokens << " tokens";
    }
    clear_memory();
  }
}

// A number that is none spoils its own row, and where x is quantised nothing but its 128 columns'
// products do.
TEST_P(LinearInvariance, NanAndInfinityStayInTheirRow) {
  constexpr int64_t kRows = 40, kCols = 256, kCount = 20;
  for (DType w : {DType::kBf16, DType::kF8E4M3, DType::kF4E2M1}) {
    for (double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      SCOPED_TRACE(::testing::Message() << "w " << dtype_name(w) << ", " << bad);
      Random random(6);
      Vector values = normal_values(random, kCount * kCols, 1.0);
      const std::vector<Weight> weights{make_weight(memory(), w, kRows, kCols, 7).weight};
      const Tensor good = memory().tensor(DType::kBf16, {kCount, kCols}, values);
      values[7 * kCols + 200] = bad;
      const Tensor spoilt = memory().tensor(DType::kBf16, {kCount, kCols}, values);
      const auto expected = multiply(good, 0, kCount, weights, true);
      const auto actual = multiply(spoilt, 0, kCount, weights, true);
      for (int64_t t = 0; t < kCount; ++t) {
        for (int64_t n = 0; n < kRows; ++n) {
          float was = 0, is = 0;
          std::memcpy(&was, expected.data() + (t * kRows + n) * 4, 4);
          std::memcpy(&is, actual.data() + (t * kRows + n) * 4, 4);
          if (t == 7) {
            ASSERT_TRUE(std::isnan(is)) << "row 7, output " << n << ": " << is;
          } else {
            ASSERT_EQ(was, is) << "row " << t << ", output " << n;
          }
        }
      }
      clear_memory();
    }
  }
}

// Scales at both ends of what a checkpoint may hold.
TEST_P(LinearInvariance, LargeAndSmallScales) {
  constexpr int64_t kRows = 24, kCols = 256;
  for (DType w : {DType::kF8E4M3, DType::kF4E2M1}) {
    for (int byte : {20, 100, 134, 135, 160, 220}) {
      SCOPED_TRACE(::testing::Message() << "w " << dtype_name(w) << ", scale byte " << byte);
      Random random(6);
      StoredWeight stored = make_weight(memory(), w, kRows, kCols, 7);
      const int64_t scale_rows = w == DType::kF4E2M1 ? kRows : 1;
      const std::vector<uint8_t> before =
          memory().get(stored.weight.scale, scale_rows * stored.weight.scale_stride);
      stored.weight.scale =
          memory().put(std::vector<uint8_t>(before.size(), static_cast<uint8_t>(byte)));
      const Vector values = rounded(DType::kBf16, normal_values(random, kCols, 1.0));
      const Tensor x = memory().tensor(DType::kBf16, {1, kCols}, values);
      const auto bytes = multiply(x, 0, 1, {stored.weight}, false);
      Comparison comparison("out");
      for (int64_t n = 0; n < kRows; ++n) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < kCols; ++k) {
          const uint8_t old =
              w == DType::kF4E2M1
                  ? before[static_cast<size_t>(n * stored.weight.scale_stride + k / 32)]
                  : before[static_cast<size_t>(k / 128)];
          const double number = std::ldexp(stored.numbers.row(n)[k], byte - old);
          sum += number * values[static_cast<size_t>(k)];
          magnitude += std::abs(number * values[static_cast<size_t>(k)]);
        }
        float actual = 0;
        std::memcpy(&actual, bytes.data() + n * 4, 4);
        const double slack = dot_bound(kCols + kCols / 32 + 8, magnitude) + kCols * 0x1p-126;
        comparison.add({n}, actual, sum, slack + rounding_bound(DType::kF32, sum, slack));
      }
      EXPECT_TRUE(comparison.result());
      clear_memory();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, LinearInvariance, ::testing::ValuesIn(op_candidates("linear")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
