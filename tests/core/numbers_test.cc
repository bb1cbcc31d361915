// Number formats, exhaustively: every code, every bf16, ties, saturation. Expected values are
// computed here by search in double over all codes, not by the code under test.
#include "core/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace dsv4 {
namespace {

// Value of an 8-bit float with 4 exponent and 3 mantissa bits, from the definition
// (spec/numerics.md 1).
double value_of(int code, int bias) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? mantissa * std::pow(2.0, 1 - bias - 3)
                                         : (1 + mantissa / 8.0) * std::pow(2.0, exponent - bias);
  return code >= 128 ? -magnitude : magnitude;
}

// Code of the nearest value among the non-negative `codes`, ties to the even mantissa.
int nearest(double magnitude, const std::vector<int>& codes, auto&& value) {
  int best = codes.front();
  for (int code : codes) {
    const double difference = std::fabs(value(code) - magnitude),
                 least = std::fabs(value(best) - magnitude);
    if (difference < least || (difference == least && code % 2 == 0)) best = code;
  }
  return best;
}

std::vector<int> range(int begin, int end) {
  std::vector<int> out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

// Floats around every boundary of a format: all bf16 values, and the neighbours of midpoints.
std::vector<float> probes(auto&& value, int codes) {
  std::vector<float> out;
  for (uint32_t bits = 0; bits < 0x8000; ++bits) {
    const float v = bf16_to_f32(static_cast<uint16_t>(bits));
    if (std::isfinite(v)) out.push_back(v);
  }
  for (int code = 0; code + 1 < codes; ++code) {
    const auto middle = static_cast<float>((value(code) + value(code + 1)) / 2);
    out.insert(out.end(), {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)});
  }
  return out;
}

TEST(Bf16, RoundsToNearestEven) {
  for (uint32_t high = 0; high < 0x7f80; ++high) {
    const float low = bf16_to_f32(static_cast<uint16_t>(high));
    EXPECT_EQ(f32_to_bf16(low), high);
    const float tie = std::bit_cast<float>(high << 16 | 0x8000u);
    EXPECT_EQ(f32_to_bf16(tie), high + (high & 1));
    EXPECT_EQ(f32_to_bf16(std::nextafter(tie, 0.0f)), high);
    EXPECT_EQ(f32_to_bf16(std::nextafter(tie, INFINITY)), high + 1);
    EXPECT_EQ(f32_to_bf16(-low), high | 0x8000);
  }
  EXPECT_TRUE(std::isnan(round_bf16(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_TRUE(
      std::isnan(round_bf16(std::bit_cast<float>(0x7f800001u))));  // a NaN with low bits only
  EXPECT_EQ(f32_to_bf16(INFINITY), 0x7f80);
}

TEST(E4m3, DecodesEveryCode) {
  for (int code = 0; code < 256; ++code) {
    const float decoded = e4m3_to_f32(static_cast<uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(decoded));
    } else {
      EXPECT_EQ(decoded, value_of(code, 7)) << code;
      EXPECT_EQ(f32_to_e4m3(decoded), code);
    }
  }
}

TEST(E4m3, EncodesToNearestEvenAndSaturates) {
  const auto value = [](int code) { return value_of(code, 7); };
  const std::vector<int> codes = range(0, 0x7f);
  for (float v : probes(value, 0x7f)) {
    const int expected = v >= 448 ? 0x7e : nearest(v, codes, value);
    ASSERT_EQ(f32_to_e4m3(v), expected) << v;
    ASSERT_EQ(f32_to_e4m3(-v), expected | 0x80) << -v;
  }
  EXPECT_EQ(f32_to_e4m3(INFINITY), 0x7e);
  EXPECT_EQ(f32_to_e4m3(NAN) & 0x7f, 0x7f);
}

// spec/numerics.md 5.
TEST(E4m3, GoldenVectors) {
  EXPECT_EQ(f32_to_e4m3(4.0f), 0x48);
  EXPECT_EQ(f32_to_e4m3(-1.203125f), 0xba);
  EXPECT_EQ(f32_to_e4m3(0.003997802734375f), 0x02);
  EXPECT_EQ(f32_to_e4m3(400.0f), 0x7c);
  EXPECT_EQ(f32_to_e4m3(448.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(460.0f), 0x7e);
  EXPECT_EQ(f32_to_e4m3(0x1p-10f), 0x00);
  EXPECT_EQ(f32_to_e4m3(3 * 0x1p-10f), 0x02);
}

TEST(E4m3Fnuz, DecodesAndEncodes) {
  const auto value = [](int code) { return value_of(code, 8); };
  const std::vector<int> codes = range(0, 0x80);
  for (int code = 0; code < 256; ++code) {
    const float decoded = e4m3fnuz_to_f32(static_cast<uint8_t>(code));
    if (code == 0x80) {
      EXPECT_TRUE(std::isnan(decoded));
    } else {
      EXPECT_EQ(decoded, value_of(code, 8)) << code;
      EXPECT_EQ(f32_to_e4m3fnuz(decoded), code);
    }
  }
  for (float v : probes(value, 0x80)) {
    const int expected = v >= 240 ? 0x7f : nearest(v, codes, value);
    ASSERT_EQ(f32_to_e4m3fnuz(v), expected) << v;
    ASSERT_EQ(f32_to_e4m3fnuz(-v), expected == 0 ? 0 : expected | 0x80) << -v;
  }
  EXPECT_EQ(f32_to_e4m3fnuz(NAN), 0x80);
}

TEST(E8m0, EveryByte) {
  for (int byte = 0; byte < 255; ++byte) {
    EXPECT_EQ(e8m0_to_f32(static_cast<uint8_t>(byte)), std::ldexp(1.0, byte - 127)) << byte;
  }
  EXPECT_TRUE(std::isnan(e8m0_to_f32(255)));
}

TEST(E2m1, EveryCodeAndTie) {
  const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const auto value = [&](int code) { return values[code]; };
  const std::vector<int> codes = range(0, 8);
  for (int code = 0; code < 8; ++code) {
    EXPECT_EQ(e2m1_to_f32(static_cast<uint8_t>(code)), values[code]);
    EXPECT_EQ(e2m1_to_f32(static_cast<uint8_t>(code | 8)), -values[code]);
  }
  for (float v : probes(value, 8)) {
    const int expected = v >= 6 ? 7 : nearest(v, codes, value);
    ASSERT_EQ(f32_to_e2m1(v), expected) << v;
    ASSERT_EQ(f32_to_e2m1(-v), expected | 8) << -v;
  }
}

// The exponent rule against exact rational arithmetic, for every positive bf16 amax
// (spec/numerics.md 3).
TEST(PowerOfTwoScale, ExactForEveryBf16) {
  for (uint32_t bits = 1; bits < 0x7f80; ++bits) {
    const float amax = bf16_to_f32(static_cast<uint16_t>(bits));
    for (float qmax : {448.0f, 6.0f}) {
      if (amax < (qmax == 448.0f ? 1e-4f : 1e-30f) || amax > 1e30f) continue;
      // Smallest e with amax <= qmax * 2^e; both sides are exact in double.
      int e = static_cast<int>(std::floor(std::log2(static_cast<double>(amax) / qmax))) - 1;
      while (std::ldexp(static_cast<double>(qmax), e) < amax) ++e;
      ASSERT_EQ(ceil_log2_ratio(amax, qmax), e) << amax << " / " << qmax;
    }
  }
  EXPECT_EQ(ceil_log2_ratio(1e-4f, 448.0f), -22);
  EXPECT_EQ(ceil_log2_ratio(0.875f, 448.0f), -9);
  EXPECT_EQ(ceil_log2_ratio(bf16_to_f32(f32_to_bf16(0.8789f)), 448.0f), -8);
  EXPECT_EQ(ceil_log2_ratio(450.0f, 448.0f), 1);
  EXPECT_EQ(ceil_log2_ratio(3.5f, 448.0f), -7);
}

}  // namespace
}  // namespace dsv4
