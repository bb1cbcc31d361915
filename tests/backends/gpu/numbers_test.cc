// Formats and functions of kernels against the scalar definitions of core/numbers.h and double.
#include "backends/gpu/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backends/gpu/math.h"
#include "core/numbers.h"
#include "tests/testing/random.h"

namespace dsv4::gpu {
namespace {

using testing::Random;

// Floats of every kind: all exponents, both signs, ties and their neighbours.
template <typename F>
void for_floats(F f) {
  Random random(1);
  for (uint32_t exponent = 0; exponent < 256; ++exponent) {
    for (int i = 0; i < 600; ++i) {
      auto mantissa = static_cast<uint32_t>(random.bits()) & 0x7fffffu;
      if (i % 3 == 0) mantissa &= 0x7fffffu << random.below(23);  // short ones: ties
      if (i % 6 == 0)
        mantissa = (mantissa + static_cast<uint32_t>(random.below(3)) - 1) & 0x7fffffu;
      const uint32_t sign = (random.bits() & 1) != 0 ? 0x80000000u : 0u;
      f(std::bit_cast<float>(sign | exponent << 23 | mantissa));
    }
  }
}

TEST(GpuNumbers, RoundAsTheScalarDefinitions) {
  for_floats([](float x) {
    EXPECT_EQ(to_bf16(x).bits, f32_to_bf16(x)) << x;
    EXPECT_EQ(bits_of(bf16_value(x)), std::bit_cast<uint32_t>(round_bf16(x))) << x;
    EXPECT_EQ(pack_bf16(x, 1.0f), 0x3f800000u | f32_to_bf16(x)) << x;
    EXPECT_EQ(pack_bf16(1.0f, x), uint32_t{f32_to_bf16(x)} << 16 | 0x3f80u) << x;
    EXPECT_EQ(to_e4m3(x), f32_to_e4m3(x)) << x;
    if (std::abs(x) <= 448.0f) {
      EXPECT_EQ(bits_of(round_to_e4m3(x)), std::bit_cast<uint32_t>(e4m3_to_f32(f32_to_e4m3(x))))
          << x;
    }
    if (std::abs(x) <= 6.0f) {
      const uint8_t code = f32_to_e2m1(x);
      EXPECT_EQ(bits_of(round_to_e2m1(x)), std::bit_cast<uint32_t>(e2m1_to_f32(code))) << x;
      EXPECT_EQ(e2m1_code(round_to_e2m1(x)), code) << x;
    }
  });
}

TEST(GpuNumbers, DecodeEveryCode) {
  for (uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    const float e4m3 = e4m3_to_f32(byte);
    if (e4m3 != e4m3) {
      EXPECT_TRUE(is_nan(e4m3_to_float(code)));
    } else {
      EXPECT_EQ(bits_of(e4m3_to_float(code)), std::bit_cast<uint32_t>(e4m3)) << code;
    }
    EXPECT_EQ(bits_of(e8m0_to_float(code)), std::bit_cast<uint32_t>(e8m0_to_f32(byte))) << code;
  }
  for (uint32_t code = 0; code < 16; ++code) {
    EXPECT_EQ(bits_of(e2m1_to_float(code)),
              std::bit_cast<uint32_t>(e2m1_to_f32(static_cast<uint8_t>(code))));
  }
}

TEST(GpuNumbers, ScalesAreTheReferenceBitForm) {
  for_floats([](float x) {
    const float amax = std::abs(x);
    for (float qmax : {448.0f, 6.0f}) {
      for (float floor : {kFp8AmaxFloor, kMxfp4AmaxFloor, kInverseRopeAmaxFloor}) {
        const Scale scale = scale_for(amax, floor, qmax);
        if (!std::isfinite(amax)) {
          EXPECT_TRUE(is_nan(scale.value));
          EXPECT_EQ(e8m0_of(scale), 255);
          continue;
        }
        const int exponent = dsv4::ceil_log2_ratio(std::max(floor, amax), qmax);
        EXPECT_EQ(scale.exponent, exponent);
        EXPECT_EQ(scale.value, std::ldexp(1.0f, exponent));
        EXPECT_EQ(scale.inverse, std::ldexp(1.0f, -exponent));
        EXPECT_EQ(e8m0_of(scale), exponent + 127);
      }
    }
  });
}

double ulps(float actual, double exact) {
  const auto nearest = static_cast<float>(exact);
  const double ulp =
      std::nextafter(std::abs(nearest), std::numeric_limits<float>::infinity()) - std::abs(nearest);
  return std::abs(actual - exact) / ulp;
}

TEST(GpuMath, ExponentialsAndLogarithms) {
  Random random(2);
  for (int i = 0; i < 300000; ++i) {
    const auto x = static_cast<float>(85 * random.uniform());
    EXPECT_LE(ulps(exp(x), std::exp(static_cast<double>(x))), 2.0) << x;
    EXPECT_LE(ulps(sigmoid(x), 1 / (1 + std::exp(-static_cast<double>(x)))), 4.0) << x;
    if (x <= 20) {
      EXPECT_LE(ulps(softplus(x), std::log1p(std::exp(static_cast<double>(x)))), 5.0) << x;
    }
  }
  EXPECT_EQ(exp(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp(0.0f), 1.0f);
  EXPECT_TRUE(is_nan(exp(kQuietNan)));
  EXPECT_EQ(softplus(21.5f), 21.5f);
}

// The definition is cos and sin in double, rounded: the same bits as the CPU's angles, but for sums
// whose double is within 2^-50 of a tie of floats, of which these hold none.
TEST(GpuMath, AnglesAreThoseOfDouble) {
  Random random(3);
  for (int i = 0; i < 2000000; ++i) {
    const double top = i % 4 == 0 ? 4.0 : i % 4 == 1 ? 1e3 : i % 4 == 2 ? 1e6 : 2e9;
    const auto angle = static_cast<float>(top * random.uniform());
    const CosSin actual = cos_sin(angle);
    ASSERT_EQ(actual.cos, static_cast<float>(std::cos(static_cast<double>(angle)))) << angle;
    ASSERT_EQ(actual.sin, static_cast<float>(std::sin(static_cast<double>(angle)))) << angle;
  }
  // Positions of a long context at the first frequency: integers next to multiples of pi / 2.
  for (int32_t position = 0; position < 1100000; position += 7) {
    const CosSin actual = rope_angle(position, 1.0f);
    ASSERT_EQ(actual.cos, static_cast<float>(std::cos(static_cast<double>(position)))) << position;
    ASSERT_EQ(actual.sin, static_cast<float>(std::sin(static_cast<double>(position)))) << position;
  }
}

}  // namespace
}  // namespace dsv4::gpu
