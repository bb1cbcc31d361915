// linear on FP8 tensor cores (candidate sm90_fp8): what its sums keep, its one order for every
// number of tokens and every tile, its edges, and how far a whole product is from the exact one.
#include <cstdio>
#include <limits>

#include "tests/ops/fp8_product.h"
#include "tests/ops/oracle_testing.h"
#include "tests/ops/stored_weight.h"
#include "tests/oracle/fp8_sums.h"

namespace dsv4::testing {
namespace {

std::vector<OpCandidate> fp8_candidates() {
  std::vector<OpCandidate> out;
  for (const OpCandidate& candidate : op_candidates("linear")) {
    if (adds_on_fp8_cores(candidate)) out.push_back(candidate);
  }
  return out;
}

class Fp8Product : public CandidateTest {
 protected:
  // x [tokens, cols] bf16 times w, as f32 bytes.
  std::vector<float> multiply(const ConstTensor& x, const Weight& w, bool quantised) {
    const int64_t tokens = x.shape[0];
    const LinearProblem problem{x, w, memory().tensor(DType::kF32, {tokens, w.rows})};
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = w.cols;
    limits.max_rows = w.rows;
    run(ops_.linear,
        {.problems = {&problem, 1}, .quantise_input = !quantised, .quantised_input = quantised},
        limits);
    return memory().get(problem.out.as<float>(), tokens * w.rows);
  }

  // Room for codes of rows of `cols`.
  struct Codes {
    Tensor rows;
    RowScales scale;
  };
  Codes room_for_codes(int64_t tokens, int64_t cols) {
    const int64_t stride = row_scale_stride(tokens);
    return {Tensor(memory().raw(tokens * cols), DType::kF8E4M3, {tokens, cols}),
            {reinterpret_cast<float*>(memory().raw(cols / 128 * stride * 4)), stride}};
  }
  // They are what a linear makes of `values` (numerics.md 4): NaN all over a group that holds one.
  void expect_codes_of(const Vector& values, const Codes& given) {
    const int64_t tokens = given.rows.shape[0], cols = given.rows.shape[1];
    const int64_t stride = given.scale.stride;
    const std::vector<uint8_t> codes = memory().get(given.rows.as<uint8_t>(), tokens * cols);
    const std::vector<float> scales = memory().get(given.scale.data, cols / 128 * stride);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t begin = 0; begin < cols; begin += 128) {
        const auto at = static_cast<size_t>(t * cols + begin);
        const std::span<const double> group = std::span(values).subspan(at, 128);
        const double scale = scales[static_cast<size_t>(begin / 128 * stride + t)];
        if (std::ranges::any_of(group, [](double value) { return std::isnan(value); })) {
          for (size_t k = at; k < at + 128; ++k)
            ASSERT_TRUE(std::isnan(scale * oracle::e4m3_decode(codes[k])));
          continue;
        }
        const oracle::QuantisedBlock expected = oracle::quantise_e4m3(group, oracle::kLinearFloor);
        ASSERT_EQ(scale, std::ldexp(1.0, expected.exponent)) << "token " << t << ", " << begin;
        for (size_t k = 0; k < 128; ++k) {
          ASSERT_EQ(oracle::e4m3_decode(codes[at + k]), oracle::e4m3_decode(expected.codes[k]))
              << "token " << t << ", column " << begin + static_cast<int64_t>(k);
        }
      }
    }
  }

  // A weight of one scale byte from codes.
  Weight weight(const std::vector<uint8_t>& codes, int64_t rows, uint8_t scale_byte) {
    const int64_t cols = std::ssize(codes) / rows;
    const int64_t blocks = (rows + 127) / 128 * ((cols + 127) / 128);
    return {.dtype = DType::kF8E4M3,
            .data = memory().put(codes),
            .rows = rows,
            .cols = cols,
            .row_stride = cols,
            .scale = memory().put(std::vector<uint8_t>(static_cast<size_t>(blocks), scale_byte)),
            .scale_stride = (cols + 127) / 128};
  }
};

// 256 + 2^-n, the small number in the instruction of the large one, or in the one after it: bits
// that are kept below the leading one. The bound of fp8_product.h stands on this number.
TEST_P(Fp8Product, KeptBits) {
  constexpr int64_t kCols = 128;
  for (const int64_t col : {int64_t{1}, int64_t{33}, int64_t{127}}) {
    int kept = 0;
    bool all_before = true;
    for (int n = -7; n <= 9; ++n) {  // 2^-9 is the smallest E4M3 number
      Vector values(kCols, 0.0);
      values[0] = 256;
      values[static_cast<size_t>(col)] = std::ldexp(1.0, -n);
      const Tensor x = memory().tensor(DType::kBf16, {1, kCols}, values);
      const std::vector<float> out =
          multiply(x, weight(std::vector<uint8_t>(kCols, oracle::e4m3_encode(1)), 1, 127), true);
      all_before = all_before && out[0] == 256 + std::ldexp(1.0, -n);
      if (all_before) kept = 8 + n;
    }
    std::printf("column %d: sums keep %d bits below the leading one\n", static_cast<int>(col),
                kept);
    EXPECT_GE(kept, kFp8SumBits) << "column " << col;
    clear_memory();
  }
}

// The outputs are those of oracle::fp8_linear, bit for bit: numbers whose exponents lie close
// together (normal x, normal W), and all E4M3 codes.
TEST_P(Fp8Product, SumsAreTheModel) {
  constexpr int64_t kTokens = 24, kRows = 136;
  for (const bool all_codes : {false, true}) {
    for (const int64_t cols : {32, 64, 128, 400, 2048}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns, " << all_codes);
      Random random(static_cast<uint64_t>(cols));
      const auto code = [&] {
        if (!all_codes) return oracle::e4m3_encode(100 * random.normal());
        uint8_t out;
        do {
          out = static_cast<uint8_t>(random.below(256));
        } while ((out & 0x7f) == 0x7f);  // NaN
        return out;
      };
      oracle::Matrix x(kTokens, cols);
      for (double& value : x.values) value = oracle::e4m3_decode(code()) * 0x1p-5;
      oracle::Weight numbers;
      numbers.rows = kRows;
      numbers.cols = cols;
      std::vector<uint8_t> codes;
      for (int64_t i = 0; i < kRows * cols; ++i) {
        codes.push_back(code());
        numbers.values.push_back(static_cast<float>(oracle::e4m3_decode(codes.back()) * 0x1p-12));
      }
      const std::vector<float> out =
          multiply(memory().tensor(DType::kBf16, {kTokens, cols}, x.values),
                   weight(codes, kRows, 115), true);
      const oracle::Matrix expected = oracle::fp8_linear(x, numbers);
      int64_t different = 0;
      for (size_t i = 0; i < out.size(); ++i) different += double{out[i]} != expected.values[i];
      EXPECT_EQ(different, 0) << "of " << out.size() << " outputs";
      clear_memory();
    }
  }
}

// Every number of tokens, and every tile: shapes whose cheapest tiles have 16 .. 128 rows of W and
// 64, 128 or 256 tokens.
TEST_P(Fp8Product, BitsDependOnTheRowOnly) {
  struct Shape {
    int64_t rows, cols, tokens;
    bool every_count;
  };
  for (const Shape& shape :
       {Shape{300, 1040, 700, true}, Shape{1540, 512, 200, false}, Shape{4000, 640, 700, false},
        Shape{8300, 1040, 140, false}, Shape{17000, 256, 400, false}}) {
    SCOPED_TRACE(::testing::Message() << shape.rows << " x " << shape.cols);
    Random random(3);
    const Tensor x =
        memory().tensor(DType::kBf16, {shape.tokens, shape.cols},
                        rounded(DType::kBf16, normal_values(random, shape.tokens * shape.cols, 1)));
    const Weight w = make_weight(memory(), DType::kF8E4M3, shape.rows, shape.cols, 4).weight;
    const std::vector<float> all = multiply(x, w, false);
    const auto row_bytes = static_cast<size_t>(shape.rows) * sizeof(float);
    for (int64_t count = 1; count < shape.tokens; ++count) {
      if (shape.every_count ? count > 200 && count % 61 != 0 : count % 31 != 1) continue;
      const int64_t begin = count * 37 % (shape.tokens - count + 1);
      const std::vector<float> some = multiply(x.rows(begin, count), w, false);
      for (int64_t t = 0; t < count; ++t) {
        ASSERT_EQ(std::memcmp(some.data() + t * shape.rows, all.data() + (begin + t) * shape.rows,
                              row_bytes),
                  0)
            << "row " << begin + t << " in a call of " << count << " rows from " << begin;
      }
    }
    clear_memory();
  }
}

// Problems of one call that need tiles of different sizes.
TEST_P(Fp8Product, ProblemsOfDifferentLengths) {
  constexpr int64_t kRows = 300, kCols = 512;
  const Weight w = make_weight(memory(), DType::kF8E4M3, kRows, kCols, 4).weight;
  std::vector<LinearProblem> problems;
  std::vector<std::vector<float>> alone;
  for (const int64_t tokens : {int64_t{1}, int64_t{200}, int64_t{30}, int64_t{1}}) {
    Random random(static_cast<uint64_t>(tokens));
    const Tensor x =
        memory().tensor(DType::kBf16, {tokens, kCols},
                        rounded(DType::kBf16, normal_values(random, tokens * kCols, 1)));
    alone.push_back(multiply(x, w, false));
    problems.push_back({x, w, memory().tensor(DType::kF32, {tokens, kRows})});
  }
  ScratchLimits limits;
  limits.max_tokens = 200;
  limits.max_cols = kCols;
  limits.max_rows = kRows;
  run(ops_.linear, {.problems = problems, .quantise_input = true}, limits);
  for (size_t i = 0; i < problems.size(); ++i) {
    EXPECT_EQ(memory().get(problems[i].out.as<float>(), std::ssize(alone[i])), alone[i])
        << "problem " << i;
  }
}

// Outputs in bf16 are those in f32 rounded once, whether the copy engine can write them (rows of 16
// bytes' multiples) or not, and nothing is written between rows, in tiles of every size.
TEST_P(Fp8Product, Bf16Outputs) {
  constexpr int64_t kCols = 384;
  for (const int64_t rows : {int64_t{40}, int64_t{300}, int64_t{1000}, int64_t{8264}}) {
    const Weight w = make_weight(memory(), DType::kF8E4M3, rows, kCols, 4).weight;
    for (const int64_t tokens : {1, 9, 50, 100, 300, 600}) {
      Random random(static_cast<uint64_t>(rows + tokens));
      const Tensor x =
          memory().tensor(DType::kBf16, {tokens, kCols},
                          rounded(DType::kBf16, normal_values(random, tokens * kCols, 1)));
      const std::vector<float> in_f32 = multiply(x, w, false);
      const Vector expected = rounded(DType::kBf16, Vector(in_f32.begin(), in_f32.end()));
      for (const int64_t gap : {0, 3, 24}) {
        SCOPED_TRACE(::testing::Message() << tokens << " x " << rows << ", gap " << gap);
        const int64_t stride = rows + gap;
        const Tensor all = memory().tensor(DType::kBf16, {tokens, stride});
        LinearProblem problem{x, w, Tensor(all.data, DType::kBf16, {tokens, rows})};
        problem.out.strides[0] = stride;
        ScratchLimits limits;
        limits.max_tokens = tokens;
        limits.max_cols = kCols;
        limits.max_rows = rows;
        run(ops_.linear, {.problems = {&problem, 1}, .quantise_input = true}, limits);
        ASSERT_EQ(memory().numbers(problem.out), expected);
        const std::vector<uint16_t> bits = memory().get(all.as<uint16_t>(), tokens * stride);
        for (int64_t i = 0; i < std::ssize(bits); ++i) {
          if (i % stride >= rows) {
            ASSERT_EQ(bits[static_cast<size_t>(i)], 0xffff) << i;
          }
        }
      }
    }
    clear_memory();
  }
}

// Many tokens and rows of W, ends within tiles, against the oracle.
TEST_P(Fp8Product, LargeTilesAgree) {
  constexpr int64_t kTokens = 300, kRows = 9000, kCols = 400;
  Random random(8);
  const Vector values = rounded(DType::kBf16, normal_values(random, kTokens * kCols, 1));
  const Tensor x = memory().tensor(DType::kBf16, {kTokens, kCols}, values);
  const StoredWeight w = make_weight(memory(), DType::kF8E4M3, kRows, kCols, 9);
  const std::vector<float> out = multiply(x, w.weight, false);
  Comparison comparison("out");
  for (int64_t t = 0; t < kTokens; t += t < 280 ? 23 : 1) {
    Vector row(values.begin() + t * kCols, values.begin() + (t + 1) * kCols);
    oracle::quantise_linear_input(row);
    for (int64_t n = t % 7; n < kRows; n += n < kRows - 140 ? 7 : 1) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < kCols; ++k) {
        const double product = row[static_cast<size_t>(k)] * w.numbers.row(n)[k];
        sum += product;
        magnitude += std::abs(product);
      }
      const double slack = dot_bound(kCols, magnitude) +
                           fp8_product_bound(row.data(), w.numbers.row(n).data(), kCols);
      comparison.add({t, n}, out[static_cast<size_t>(t * kRows + n)], sum, slack);
    }
  }
  EXPECT_TRUE(comparison.result());
  std::printf("largest error / bound %.3f\n", comparison.worst_ratio());
}

// Inputs that were quantised before come back with their own codes, also where their scales are far
// below those that quantising gives.
TEST_P(Fp8Product, SmallQuantisedInputs) {
  constexpr int64_t kCols = 256;
  for (const int exponent : {-100, -42, -30, 0}) {
    Random random(5);
    Vector values;
    for (int64_t k = 0; k < kCols; ++k) {
      uint8_t code;
      do {
        code = static_cast<uint8_t>(random.below(256));
      } while ((code & 0x7f) == 0x7f);
      values.push_back(std::ldexp(oracle::e4m3_decode(code), exponent));
    }
    const Tensor x = memory().tensor(DType::kBf16, {1, kCols}, values);
    const StoredWeight w = make_weight(memory(), DType::kF8E4M3, 40, kCols, 6);
    const std::vector<float> out = multiply(x, w.weight, true);
    Comparison comparison("out");
    for (int64_t n = 0; n < 40; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < kCols; ++k) {
        const double product = values[static_cast<size_t>(k)] * w.numbers.row(n)[k];
        sum += product;
        magnitude += std::abs(product);
      }
      comparison.add({n}, out[static_cast<size_t>(n)], sum,
                     dot_bound(kCols, magnitude) +
                         fp8_product_bound(values.data(), w.numbers.row(n).data(), kCols));
    }
    EXPECT_TRUE(comparison.result()) << "scale 2^" << exponent;
    clear_memory();
  }
}

// A code NaN, or a scale NaN, of W spoils the outputs of its row, or its block of rows, alone.
TEST_P(Fp8Product, NanOfTheWeight) {
  constexpr int64_t kRows = 140, kCols = 256;
  Random random(5);
  const Tensor x = memory().tensor(DType::kBf16, {3, kCols},
                                   rounded(DType::kBf16, normal_values(random, 3 * kCols, 1)));
  std::vector<uint8_t> codes(kRows * kCols, oracle::e4m3_encode(1));
  codes[17 * kCols + 200] = 0x7f;
  codes[139 * kCols] = 0xff;
  const std::vector<float> by_code = multiply(x, weight(codes, kRows, 120), false);
  for (int64_t i = 0; i < std::ssize(by_code); ++i)
    EXPECT_EQ(std::isnan(by_code[static_cast<size_t>(i)]), i % kRows == 17 || i % kRows == 139)
        << "output " << i;

  Weight w = weight(std::vector<uint8_t>(kRows * kCols, oracle::e4m3_encode(1)), kRows, 120);
  w.scale = memory().put(std::vector<uint8_t>{120, 121, 120, 255});
  const std::vector<float> by_scale = multiply(x, w, false);
  for (int64_t i = 0; i < std::ssize(by_scale); ++i)
    EXPECT_EQ(std::isnan(by_scale[static_cast<size_t>(i)]), i % kRows >= 128) << "output " << i;
}

// Codes and scales of inverse_rope are its values, and give the same products as these do.
TEST_P(Fp8Product, CodesOfInverseRope) {
  ASSERT_TRUE(ops_.takes_e4m3);
  constexpr int64_t kHeads = 4, kDim = 512, kCols = kHeads * kDim, kRows = 200;
  const std::vector<float> frequencies = oracle::rope_frequencies({}, 64);
  for (const int64_t tokens : {int64_t{1}, int64_t{17}, int64_t{70}, int64_t{300}}) {
    SCOPED_TRACE(::testing::Message() << tokens << " tokens");
    Random random(4);
    Vector o = rounded(DType::kBf16, normal_values(random, tokens * kCols, 0.3));
    std::fill_n(o.begin(), 128, 0.0);  // an empty group: the floor decides its scale
    for (int64_t i = 128; i < 256; ++i) o[static_cast<size_t>(i)] *= 0x1p-20;
    o[300] = std::numeric_limits<double>::quiet_NaN();
    std::vector<int32_t> positions;
    for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>(t * 97));
    const int64_t stride = row_scale_stride(tokens);
    InverseRopeParams params{.o = memory().tensor(DType::kBf16, {tokens, kHeads, kDim}, o),
                             .rope = {memory().put(frequencies), 64},
                             .positions = memory().put(positions),
                             .quantise = true,
                             .out = memory().tensor(DType::kBf16, {tokens, kHeads, kDim})};
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.num_heads = kHeads;
    limits.head_dim = kDim;
    run(ops_.inverse_rope, params, limits);
    const Tensor values = params.out;
    params.out = Tensor(memory().raw(tokens * kCols), DType::kF8E4M3, {tokens, kHeads, kDim});
    params.scale = {reinterpret_cast<float*>(memory().raw(kCols / 128 * stride * 4)), stride};
    run(ops_.inverse_rope, params, limits);

    const Vector expected = memory().numbers(values);
    const std::vector<uint8_t> codes = memory().get(params.out.as<uint8_t>(), tokens * kCols);
    const std::vector<float> scales = memory().get(params.scale.data, kCols / 128 * stride);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < kCols; ++k) {
        const auto idx = static_cast<size_t>(t * kCols + k);
        const double value = oracle::e4m3_decode(codes[idx]) *
                             double{scales[static_cast<size_t>(k / 128 * stride + t)]};
        ASSERT_TRUE(value == expected[idx] || (std::isnan(value) && std::isnan(expected[idx])))
            << "token " << t << ", column " << k << ": " << value << ", " << expected[idx];
      }
    }

    const Weight w = make_weight(memory(), DType::kF8E4M3, kRows, kCols, 4).weight;
    const auto flat = [&](const Tensor& x) {
      return ConstTensor(x.data, x.dtype, {tokens, kCols});
    };
    const std::vector<float> of_values = multiply(flat(values), w, true);
    const LinearProblem problem{flat(params.out), w, memory().tensor(DType::kF32, {tokens, kRows}),
                                params.scale};
    limits.max_cols = kCols;
    limits.max_rows = kRows;
    run(ops_.linear, {.problems = {&problem, 1}}, limits);
    const std::vector<float> of_codes = memory().get(problem.out.as<float>(), tokens * kRows);
    for (size_t i = 0; i < of_codes.size(); ++i) {
      ASSERT_TRUE(of_codes[i] == of_values[i] ||
                  (std::isnan(of_codes[i]) && std::isnan(of_values[i])))
          << "output " << i << ": " << of_codes[i] << ", " << of_values[i];
      ASSERT_EQ(std::isnan(of_codes[i]), i < kRows) << "output " << i;
    }
    clear_memory();
  }
}

// rms_norm's codes are those of its values in bf16; a product's, too, of problems side by side, and
// the next product has the same bits with them as with the values.
TEST_P(Fp8Product, CodesOfNormAndProduct) {
  for (const int64_t cols : {128, 512, 1024, 1536, 4096}) {
    for (const int64_t tokens : {1, 17, 70, 140, 300}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens of " << cols);
      Random random(static_cast<uint64_t>(cols + tokens));
      Vector x = rounded(DType::kBf16, normal_values(random, tokens * cols, 0.3));
      std::fill_n(x.begin(), 128, 0.0);  // an empty group: the floor decides its scale
      for (int64_t i = (tokens - 1) * cols; i < tokens * cols; ++i) {
        x[static_cast<size_t>(i)] *= 0x1p-30;  // eps decides
      }
      if (tokens > 1) x[static_cast<size_t>(cols) + 77] = std::numeric_limits<double>::quiet_NaN();
      RmsNormParams norm{
          .x = memory().tensor(DType::kBf16, {tokens, cols}, x),
          .weight = memory().tensor(DType::kBf16, {cols},
                                    rounded(DType::kBf16, normal_values(random, cols, 1))),
          .eps = 1e-6f,
          .out = memory().tensor(DType::kBf16, {tokens, cols})};
      ScratchLimits limits;
      limits.max_tokens = tokens;
      run(ops_.rms_norm, norm, limits);
      const Tensor normed = norm.out;
      const Codes codes = room_for_codes(tokens, cols);
      norm.out = codes.rows;
      norm.scale = codes.scale;
      run(ops_.rms_norm, norm, limits);
      expect_codes_of(memory().numbers(normed), codes);
      if (HasFatalFailure()) return;
      // The same beside the norm of other rows.
      const Codes again = room_for_codes(tokens, cols);
      RmsNormParams other = norm;
      other.x.shape[1] = other.weight.shape[0] = 128;
      other.out = memory().tensor(DType::kBf16, {tokens, 128});
      other.scale = {};
      run(ops_.rms_norm, other, limits);
      const auto bits = [&] { return memory().get(other.out.as<uint16_t>(), tokens * 128); };
      const std::vector<uint16_t> alone = bits();
      other.out = memory().tensor(DType::kBf16, {tokens, 128});
      norm.out = again.rows;
      norm.scale = again.scale;
      norm.beside = &other;
      run(ops_.rms_norm, norm, limits);
      expect_codes_of(memory().numbers(normed), again);
      if (HasFatalFailure()) return;
      EXPECT_EQ(bits(), alone);

      // Two problems, whose outputs are the columns of one; once so many rows that blocks have
      // several tiles.
      const int64_t rows = tokens == 17 && cols == 1024 ? 8960 : 256, out_cols = 2 * rows;
      const Weight w[] = {make_weight(memory(), DType::kF8E4M3, rows, cols, 4).weight,
                          make_weight(memory(), DType::kF8E4M3, rows, cols, 5).weight};
      const Tensor values = memory().tensor(DType::kBf16, {tokens, out_cols});
      const Codes next = room_for_codes(tokens, out_cols);
      limits.max_cols = std::max(cols, out_cols);
      limits.max_rows = rows;
      for (const bool as_codes : {false, true}) {
        LinearProblem problems[2];
        for (int64_t i = 0; i < 2; ++i) {
          Tensor out = as_codes ? next.rows : values;
          out.data = out.as<char>() + i * rows * size_of(out.dtype);
          out.shape[1] = rows;
          RowScales scale = next.scale;
          scale.data += i * rows / 128 * scale.stride;
          problems[i] = {codes.rows, w[i], out, codes.scale, as_codes ? scale : RowScales{}};
        }
        run(ops_.linear, {.problems = problems}, limits);
      }
      expect_codes_of(memory().numbers(values), next);
      if (HasFatalFailure()) return;

      const Weight last = make_weight(memory(), DType::kF8E4M3, 136, out_cols, 6).weight;
      const std::vector<float> expected = multiply(values, last, false);
      const LinearProblem problem{next.rows, last, memory().tensor(DType::kF32, {tokens, 136}),
                                  next.scale};
      limits.max_rows = 136;
      run(ops_.linear, {.problems = {&problem, 1}}, limits);
      const std::vector<float> actual = memory().get(problem.out.as<float>(), tokens * 136);
      for (size_t i = 0; i < actual.size(); ++i) {
        ASSERT_TRUE(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i])))
            << "output " << i << ": " << actual[i] << ", " << expected[i];
      }
      clear_memory();
    }
  }
}

// A product that norms or rotates its input itself has the bits of one that follows rms_norm or
// inverse_rope: one problem and several that share x or not, blocks of several tiles, codes out.
TEST_P(Fp8Product, InputOnItsWay) {
  ASSERT_NE(ops_.makes_input, nullptr);
  struct Shape {
    int64_t cols, problems, rows;
    bool shares_x;
  };
  constexpr int64_t kDim = 512;
  const std::vector<float> frequencies = oracle::rope_frequencies({}, 64);
  const auto columns = [](Tensor rows, int64_t begin, int64_t count) {
    rows.data = rows.as<char>() + begin * size_of(rows.dtype);
    rows.shape[1] = count;
    return rows;
  };
  const auto from_column = [](RowScales scale, int64_t begin) {
    scale.data += begin / 128 * scale.stride;
    return scale;
  };
  for (const Shape& shape :
       {Shape{1024, 1, 200, true}, Shape{1536, 2, 256, true}, Shape{512, 3, 128, false},
        Shape{4096, 2, 384, false}, Shape{1024, 1, 8960, true}, Shape{512, 16, 1024, false},
        Shape{7168, 1, 128, true}}) {
    for (const int64_t tokens : {1, 2, 3, 4}) {
      for (const bool rotates : {false, true}) {
        for (const bool as_codes : {false, true}) {
          // What is made fits 8192 values, weights of a norm included.
          if (rotates ? shape.cols % kDim != 0 : shape.cols > 4096) continue;
          if ((tokens + (rotates ? 0 : 1)) * shape.cols > 8192) continue;
          if (as_codes && shape.rows % 128 != 0) continue;
          SCOPED_TRACE(::testing::Message()
                       << tokens << " tokens, " << shape.problems << " x " << shape.rows << " x "
                       << shape.cols << (rotates ? ", rotated" : ", normed")
                       << (as_codes ? ", codes" : ""));
          const int64_t parts = shape.shares_x ? 1 : shape.problems, width = parts * shape.cols;
          const int64_t out_cols = shape.problems * shape.rows;
          Random random(static_cast<uint64_t>(shape.cols + tokens));
          Vector values = rounded(DType::kBf16, normal_values(random, tokens * width, 0.3));
          std::fill_n(values.begin(), 128, 0.0);  // the floor decides
          for (int64_t i = width - 128; i < width; ++i) values[static_cast<size_t>(i)] *= 0x1p-20;
          if (tokens == 3)
            values[static_cast<size_t>(width) + 77] = std::numeric_limits<double>::quiet_NaN();
          const Tensor x = memory().tensor(DType::kBf16, {tokens, width}, values);
          const Tensor norm =
              memory().tensor(DType::kBf16, {shape.cols},
                              rounded(DType::kBf16, normal_values(random, shape.cols, 1)));
          std::vector<int32_t> positions;
          for (int64_t t = 0; t < tokens; ++t)
            positions.push_back(static_cast<int32_t>(1 + t * 97));
          const RopeView rope{memory().put(frequencies), 64};
          const int32_t* device_positions = memory().put(positions);
          ScratchLimits limits;
          limits.max_tokens = tokens;
          limits.max_cols = width;
          limits.max_rows = shape.rows;
          limits.num_heads = static_cast<int>(width / kDim);
          limits.head_dim = kDim;
          const Codes codes = room_for_codes(tokens, width);
          if (rotates) {
            const auto heads = [&](const Tensor& rows) {
              return Tensor(rows.data, rows.dtype, {tokens, width / kDim, kDim});
            };
            run(ops_.inverse_rope,
                {.o = heads(x),
                 .rope = rope,
                 .positions = device_positions,
                 .quantise = true,
                 .out = heads(codes.rows),
                 .scale = codes.scale},
                limits);
          } else {
            // Groups of columns are rows of their own.
            for (int64_t p = 0; p < parts; ++p) {
              const int64_t begin = p * shape.cols;
              run(ops_.rms_norm,
                  {.x = columns(x, begin, shape.cols),
                   .weight = norm,
                   .eps = 1e-6f,
                   .out = columns(codes.rows, begin, shape.cols),
                   .scale = from_column(codes.scale, begin)},
                  limits);
            }
          }
          const Weight weights[] = {
              make_weight(memory(), DType::kF8E4M3, shape.rows, shape.cols, 0).weight,
              make_weight(memory(), DType::kF8E4M3, shape.rows, shape.cols, 1).weight};
          const auto multiply_all = [&](bool late) {
            const Codes next = room_for_codes(tokens, out_cols);
            const Tensor bf16 = memory().tensor(DType::kBf16, {tokens, out_cols});
            std::vector<LinearProblem> problems;
            for (int64_t p = 0; p < shape.problems; ++p) {
              const int64_t at = shape.shares_x ? 0 : p * shape.cols;
              LinearProblem problem{
                  columns(late ? x : codes.rows, at, shape.cols), weights[p % 2],
                  columns(as_codes ? next.rows : bf16, p * shape.rows, shape.rows)};
              if (as_codes) problem.out_scale = from_column(next.scale, p * shape.rows);
              if (!late) {
                problem.x_scale = from_column(codes.scale, at);
              } else if (rotates) {
                problem.input = RotatedInput{rope, device_positions, kDim};
              } else {
                problem.input = NormedInput{norm, 1e-6f};
              }
              EXPECT_TRUE(!late || ops_.makes_input(problem));
              problems.push_back(problem);
            }
            run(ops_.linear,
                {.problems = problems, .quantised_input = true, .products = Products::kFp8},
                limits);
            if (!as_codes) return memory().numbers(bf16);
            const auto bytes = memory().get(next.rows.as<uint8_t>(), tokens * out_cols);
            const auto scales = memory().get(next.scale.data, out_cols / 128 * next.scale.stride);
            Vector out;
            for (int64_t t = 0; t < tokens; ++t) {
              for (int64_t n = 0; n < out_cols; ++n) {
                const auto at = static_cast<size_t>(n / 128 * next.scale.stride + t);
                out.push_back(oracle::e4m3_decode(bytes[static_cast<size_t>(t * out_cols + n)]) *
                              double{scales[at]});
              }
            }
            return out;
          };
          const Vector expected = multiply_all(false), actual = multiply_all(true);
          int64_t wrong = 0;
          for (size_t i = 0; i < expected.size(); ++i) {
            if (!(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i]))))
              ++wrong;
          }
          EXPECT_EQ(wrong, 0) << "of " << expected.size();
          clear_memory();
        }
      }
    }
  }
  // What it does not take, it says.
  const Weight w = make_weight(memory(), DType::kF8E4M3, 128, 1024, 1).weight;
  const Tensor many = memory().tensor(DType::kBf16, {64, 1024});
  const LinearProblem problem{.x = many, .w = w, .out = {}, .input = NormedInput{many, 1e-6f}};
  EXPECT_FALSE(ops_.makes_input(problem));
}

// The measure of DeepGEMM's tests, 1 - 2 sum(xy) / sum(x^2 + y^2), against exact products of the
// same codes: at most 1e-3 there, for codes against numbers that were not quantised.
TEST_P(Fp8Product, ErrorOfAWholeProduct) {
  for (const auto& [rows, cols] :
       {std::pair{256, 1024}, std::pair{256, 4096}, std::pair{64, 8192}}) {
    constexpr int64_t kTokens = 32;
    Random random(21);
    Vector values = rounded(DType::kBf16, normal_values(random, kTokens * cols, 1));
    const Tensor x = memory().tensor(DType::kBf16, {kTokens, cols}, values);
    std::vector<uint8_t> codes;
    for (int64_t i = 0; i < int64_t{rows} * cols; ++i)
      codes.push_back(oracle::e4m3_encode(100 * random.normal()));
    const std::vector<float> out = multiply(x, weight(codes, rows, 115), false);
    double error = 0, squares = 0, products = 0, largest = 0, largest_error = 0;
    Comparison comparison("out");
    for (int64_t t = 0; t < kTokens; ++t) {
      std::span<double> row =
          std::span(values).subspan(static_cast<size_t>(t * cols), static_cast<size_t>(cols));
      oracle::quantise_linear_input(row);
      for (int64_t n = 0; n < rows; ++n) {
        double sum = 0, magnitude = 0;
        Vector numbers(static_cast<size_t>(cols));
        for (int64_t k = 0; k < cols; ++k) {
          const auto idx = static_cast<size_t>(k);
          numbers[idx] = oracle::e4m3_decode(codes[static_cast<size_t>(n * cols + k)]) * 0x1p-12;
          sum += row[idx] * numbers[idx];
          magnitude += std::abs(row[idx] * numbers[idx]);
        }
        const double is = out[static_cast<size_t>(t * rows + n)];
        comparison.add(
            {t, n}, is, sum,
            dot_bound(cols, magnitude) + fp8_product_bound(row.data(), numbers.data(), cols));
        squares += sum * sum + is * is;
        products += sum * is;
        error += (sum - is) * (sum - is);
        largest = std::max(largest, std::abs(sum));
        largest_error = std::max(largest_error, std::abs(sum - is));
      }
    }
    EXPECT_TRUE(comparison.result());
    const double difference = 1 - 2 * products / squares;
    std::printf(
        "K %d: calc_diff %.2e, rms error / rms %.2e, largest error / largest %.2e, error / "
        "bound %.3f\n",
        static_cast<int>(cols), difference, std::sqrt(2 * error / squares), largest_error / largest,
        comparison.worst_ratio());
    EXPECT_LT(difference, 1e-5);
    clear_memory();
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, Fp8Product, ::testing::ValuesIn(fp8_candidates()),
                         candidate_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Fp8Product);

}  // namespace
}  // namespace dsv4::testing
