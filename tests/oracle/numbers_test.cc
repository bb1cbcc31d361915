// The oracle's number formats against the golden vectors of the specification, and the library's
// against the oracle, exhaustively.
#include "tests/oracle/numbers.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "core/numbers.h"
#include "tests/oracle/layer_parts.h"
#include "tests/testing/random.h"

namespace oracle {
namespace {

TEST(OracleNumbers, E4m3GoldenVectors) {  // numerics.md 5
  EXPECT_EQ(e4m3_encode(4.0), 0x48);
  EXPECT_EQ(e4m3_encode(-1.203125), 0xba);
  EXPECT_EQ(e4m3_encode(0.003997802734375), 0x02);
  EXPECT_EQ(e4m3_encode(400), 0x7c);
  EXPECT_EQ(e4m3_encode(448), 0x7e);
  EXPECT_EQ(e4m3_encode(460), 0x7e);
  EXPECT_EQ(e4m3_encode(0x1p-10), 0x00);
  EXPECT_EQ(e4m3_encode(3 * 0x1p-10), 0x02);
}

TEST(OracleNumbers, E2m1Ties) {  // numerics.md 2
  const double from[] = {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7};
  const double to[] = {0, 1, 1, 2, 2, 4, 4, 6};
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(e2m1_decode(e2m1_encode(from[i])), to[i]);
    EXPECT_EQ(e2m1_decode(e2m1_encode(-from[i])), -to[i]);
  }
}

// The definition: the finite code whose value is nearest, the even one of two.
template <typename Decode>
uint8_t search_all_codes(double value, int num_codes, Decode decode) {
  int best = -1;
  for (int code = 0; code < num_codes; ++code) {
    const double decoded = decode(static_cast<uint8_t>(code));
    if (std::isnan(decoded) || std::signbit(decoded) != std::signbit(value)) continue;
    if (best >= 0) {
      const double error = std::abs(decoded - value);
      const double best_error = std::abs(decode(static_cast<uint8_t>(best)) - value);
      if (error > best_error || (error == best_error && code % 2 != 0)) continue;
    }
    best = code;
  }
  return static_cast<uint8_t>(best);
}

TEST(OracleNumbers, EncodersFindTheNearestOfAllCodes) {
  dsv4::testing::Random random(2);
  for (int i = 0; i < 20000; ++i) {
    double value = random.normal() * std::ldexp(1.0, static_cast<int>(random.below(24)) - 14);
    if (i % 3 == 0) value = round_bf16(value);
    if (i % 3 == 1) value = std::ldexp(std::nearbyint(value * 16), -4);  // many ties
    ASSERT_EQ(e4m3_encode(value), search_all_codes(value, 256, e4m3_decode)) << value;
    ASSERT_EQ(e2m1_encode(value), search_all_codes(value, 16, e2m1_decode)) << value;
  }
}

TEST(OracleNumbers, ScaleExponents) {  // numerics.md 5
  const double amax[] = {1e-4, 0.875, 0.87890625, 1, 448, 450, 3.5};
  const int exponent[] = {-22, -9, -8, -8, 0, 1, -7};
  for (int i = 0; i < 7; ++i) EXPECT_EQ(scale_exponent(amax[i], 448), exponent[i]) << amax[i];
}

TEST(OracleNumbers, GoldenTile) {  // cache_layouts.md 1
  Vector row(128, 0.0);
  row[0] = 1.0, row[1] = -0.3, row[2] = 0.001, row[3] = 100.0;
  const KvRow packed = quantise_kv_row(row, 64);
  EXPECT_EQ(packed.scales, std::vector<uint8_t>{0x7d});
  const uint8_t codes[] = {0x48, 0xba, 0x02, 0x7c, 0x00};
  for (int i = 0; i < 5; ++i) EXPECT_EQ(packed.codes[i], codes[i]);
  const KvRow zero = quantise_kv_row(Vector(128, 0.0), 64);
  EXPECT_EQ(zero.scales, std::vector<uint8_t>{105});
}

TEST(OracleNumbers, Sinkhorn) {  // numerics.md 5
  Matrix comb(4, 4);
  comb.values = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 1, 0, 0, -1};
  const double expected[] = {0.3692423, 0.1387450, 0.0913641, 0.4006475, 0.0821743, 0.6201834,
                             0.0552705, 0.2423707, 0.0541121, 0.0552705, 0.7310142, 0.1596021,
                             0.4944702, 0.1858001, 0.1223501, 0.1973787};
  sinkhorn(comb, 1e-6, 20);
  for (int i = 0; i < 16; ++i) EXPECT_NEAR(comb.values[i], expected[i], 0.5e-7) << i;
}

TEST(OracleNumbers, RopeGoldenValues) {  // attention.md 3; 7 digits: frequencies are binary32
  const std::vector<float> plain = rope_frequencies({}, 64);
  const std::vector<float> yarn = rope_frequencies({.theta = 160000, .yarn = true}, 64);
  const struct {
    const std::vector<float>& frequencies;
    int64_t position;
    int pair;
    double c, s;
  } rows[] = {{plain, 1, 0, 0.54030231, 0.84147098},
              {plain, 1000, 16, -0.83907153, -0.54402111},
              {yarn, 1000, 16, -0.64025384, 0.76816341},
              {yarn, 65536, 31, 0.99930712, 0.03721932}};
  for (const auto& row : rows) {
    Vector x(64, 0.0);
    x[2 * row.pair] = 1;
    rotate_tail(x, row.frequencies, row.position);
    // A frequency is off by half a unit in the last place: 2^-24 of the angle, at most 38 radians.
    EXPECT_NEAR(x[2 * row.pair], row.c, 1e-6);
    EXPECT_NEAR(x[2 * row.pair + 1], row.s, 1e-6);
    rotate_tail(x, row.frequencies, row.position, -1);
    EXPECT_NEAR(x[2 * row.pair], 1.0, 1e-15);
  }
  const double mixed[] = {2.265625e-3, 1.396801e-3, 8.496897e-4, 5.080820e-4, 2.969778e-4,
                          1.681800e-4, 9.086784e-5, 4.544423e-5, 1.953125e-5, 5.372313e-6};
  for (int i = 0; i < 10; ++i) EXPECT_NEAR(yarn[16 + i] / mixed[i], 1, 5e-7) << 16 + i;
}

TEST(OracleNumbers, HadamardIsAnOrthonormalInvolution) {
  dsv4::testing::Random random(3);
  Vector x(128);
  for (double& value : x) value = random.normal();
  Vector y = x;
  hadamard(y);
  double squares_x = 0, squares_y = 0, sum = 0;
  for (int i = 0; i < 128; ++i) {
    squares_x += x[i] * x[i];
    squares_y += y[i] * y[i];
    sum += x[i];
  }
  EXPECT_NEAR(squares_x, squares_y, 1e-12 * squares_x);
  EXPECT_NEAR(y[0], sum * 0.08838834764831845, 1e-13);  // first column: all ones
  hadamard(y);
  for (int i = 0; i < 128; ++i) EXPECT_NEAR(y[i], x[i], 1e-13);
}

// ---- the library's formats, which every kernel is checked with -------------------------------

TEST(LibraryNumbers, DecodesEveryCodeAsTheOracle) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    const double e4m3 = e4m3_decode(byte), e8m0 = e8m0_decode(byte);
    if (std::isnan(e4m3)) {
      EXPECT_TRUE(std::isnan(dsv4::e4m3_to_f32(byte)));
    } else {
      EXPECT_EQ(dsv4::e4m3_to_f32(byte), e4m3);
      EXPECT_EQ(std::signbit(dsv4::e4m3_to_f32(byte)), std::signbit(e4m3));
    }
    if (std::isnan(e8m0)) {
      EXPECT_TRUE(std::isnan(dsv4::e8m0_to_f32(byte)));
    } else {
      EXPECT_EQ(dsv4::e8m0_to_f32(byte), e8m0);
    }
  }
  for (uint8_t code = 0; code < 16; ++code) {
    EXPECT_EQ(dsv4::e2m1_to_f32(code), e2m1_decode(code));
  }
}

TEST(LibraryNumbers, EncodesEveryBf16AsTheOracle) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = dsv4::bf16_to_f32(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(dsv4::f32_to_e4m3(value), e4m3_encode(value)) << value;
    ASSERT_EQ(dsv4::f32_to_e2m1(value), e2m1_encode(value)) << value;
  }
}

TEST(LibraryNumbers, RoundsToBf16AsTheOracle) {
  dsv4::testing::Random random(1);
  for (int i = 0; i < 1000000; ++i) {
    auto bits = static_cast<uint32_t>(random.bits());
    if (i % 4 == 0) bits = (bits & 0xffff0000u) | 0x8000u;  // ties
    const float value = std::bit_cast<float>(bits);
    if (std::isnan(value)) continue;
    ASSERT_EQ(dsv4::round_bf16(value), round_bf16(value)) << value;
  }
  EXPECT_EQ(round_f32(1.0 + 0x1p-24), 1.0);
  EXPECT_EQ(round_f32(1.0 + 3 * 0x1p-24), 1.0 + 0x1p-22);
}

TEST(LibraryNumbers, ChoosesTheScaleOfEveryBf16AsTheOracle) {
  for (uint32_t bits = 1; bits < 0x7f80; ++bits) {
    const float amax = dsv4::bf16_to_f32(static_cast<uint16_t>(bits));
    if (amax >= 1e-30f && amax <= 1e30f) {
      ASSERT_EQ(dsv4::ceil_log2_ratio(amax, 448.0f), scale_exponent(amax, 448)) << amax;
      ASSERT_EQ(dsv4::ceil_log2_ratio(amax, 6.0f), scale_exponent(amax, 6)) << amax;
    }
  }
}

}  // namespace
}  // namespace oracle
