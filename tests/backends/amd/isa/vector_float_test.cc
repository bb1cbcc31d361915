#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/half.h"
#include "tests/backends/amd/isa/snippet.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kDenormal = 0x1p-140f;

TEST(VectorFloat, Arithmetic) {
  EXPECT_EQ(eval_f("v_add_f32_e32 v9, v0, v1", 1.5f, 2.25f), 3.75f);
  EXPECT_EQ(eval_f("v_sub_f32_e32 v9, v0, v1", 1.5f, 2.25f), -0.75f);
  EXPECT_EQ(eval_f("v_subrev_f32_e32 v9, v0, v1", 1.5f, 2.25f), 0.75f);
  EXPECT_EQ(eval_f("v_mul_f32_e64 v9, -v0, |v1|", 3.0f, -2.0f), -6.0f);
  EXPECT_EQ(eval_f("v_mul_legacy_f32_e64 v9, v0, v1", 0.0f, kInf), 0.0f);
  EXPECT_EQ(eval_f("v_add_f32_e32 v9, v0, v1", kDenormal, kDenormal),
            0x1p-139f);  // denormals are kept
  EXPECT_EQ(eval_f("v_fmamk_f32 v9, v0, 0x40400000, v2", 2.0f, 0, 1.0f), 7.0f);
  EXPECT_EQ(eval_f("v_fmaak_f32 v9, v0, v1, 0x40400000", 2.0f, 5.0f), 13.0f);
  Snippet fmac("v_fmac_f32_e32 v9, v0, v1");
  EXPECT_EQ(fmac.vf(0, 2.0f).vf(1, 5.0f).vf(9, 1.0f).run().out_f(9), 11.0f);
}

// One rounding, whatever the sizes: against the C library.
TEST(VectorFloat, FusedMultiplyAddRoundsOnce) {
  dsv4::testing::Random random(3);
  for (int i = 0; i < 200000; ++i) {
    const auto any = [&] {
      const float x = std::bit_cast<float>(static_cast<uint32_t>(random.bits()));
      return i % 2 == 0
                 ? x
                 : static_cast<float>(random.normal() *
                                      std::ldexp(1.0, static_cast<int>(random.below(60)) - 30));
    };
    const float a = any(), b = any(), c = i % 3 == 0 ? -a * b : any();
    const float expected = std::fma(a, b, c), actual = fma_f32(a, b, c);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(actual)) << a << " " << b << " " << c;
    } else {
      ASSERT_EQ(std::bit_cast<uint32_t>(actual), std::bit_cast<uint32_t>(expected))
          << a << " " << b << " " << c;
    }
  }
}

TEST(VectorFloat, MinimumAndMaximumPreferNumbers) {
  EXPECT_EQ(eval_f("v_min_f32_e32 v9, v0, v1", kNan, 2.0f), 2.0f);
  EXPECT_EQ(eval_f("v_max_f32_e32 v9, v0, v1", 2.0f, kNan), 2.0f);
  EXPECT_TRUE(std::signbit(eval_f("v_min_f32_e32 v9, v0, v1", 0.0f, -0.0f)));
  EXPECT_FALSE(std::signbit(eval_f("v_max_f32_e32 v9, v0, v1", -0.0f, 0.0f)));
  EXPECT_EQ(eval_f("v_med3_f32 v9, v0, v1, v2", 3.0f, 1.0f, 2.0f), 2.0f);
  EXPECT_EQ(eval_f("v_med3_f32 v9, v0, v1, v2", kNan, 1.0f, 2.0f), 1.0f);
  EXPECT_EQ(eval_f("v_max3_f32 v9, v0, v1, v2", 3.0f, 1.0f, kNan), 3.0f);
  EXPECT_EQ(eval_f("v_min3_f32 v9, v0, v1, v2", 3.0f, 1.0f, kNan), 1.0f);
  EXPECT_TRUE(std::isnan(eval_f("v_maximum3_f32 v9, v0, v1, v2", 3.0f, 1.0f, kNan)));
  EXPECT_EQ(eval_f("v_minimum3_f32 v9, v0, v1, v2", 3.0f, 1.0f, 2.0f), 1.0f);
}

TEST(VectorFloat, Rounding) {
  EXPECT_EQ(eval_f("v_floor_f32_e32 v9, v0", -1.5f), -2.0f);
  EXPECT_EQ(eval_f("v_ceil_f32_e32 v9, v0", -1.5f), -1.0f);
  EXPECT_EQ(eval_f("v_trunc_f32_e32 v9, v0", -1.5f), -1.0f);
  EXPECT_EQ(eval_f("v_rndne_f32_e32 v9, v0", 2.5f), 2.0f);
  EXPECT_EQ(eval_f("v_fract_f32_e32 v9, v0", -0.25f), 0.75f);
  EXPECT_LT(eval_f("v_fract_f32_e32 v9, v0", -1e-30f), 1.0f);
  EXPECT_EQ(eval_f("v_ldexp_f32 v9, v0, 3", 1.5f), 12.0f);
  EXPECT_EQ(eval_f("v_frexp_mant_f32_e32 v9, v0", 12.0f), 0.75f);
  EXPECT_EQ(eval("v_frexp_exp_i32_f32_e32 v9, v0", std::bit_cast<uint32_t>(12.0f)), 4u);
  EXPECT_EQ(eval("v_frexp_exp_i32_f32_e32 v9, v0", std::bit_cast<uint32_t>(kInf)), 0u);
}

// Within one unit in the last place, as documented; denormals flushed.
TEST(VectorFloat, Transcendentals) {
  dsv4::testing::Random random(4);
  const auto close = [](double actual, double expected) {
    return std::fabs(actual - expected) <= std::fabs(expected) * 0x1p-23;
  };
  for (int i = 0; i < 2000; ++i) {
    const float x = static_cast<float>(random.normal() * 20), positive = std::fabs(x) + 1e-3f;
    EXPECT_TRUE(close(rcp(x), 1.0 / x)) << x;
    EXPECT_TRUE(close(rsq(positive), 1.0 / std::sqrt(static_cast<double>(positive)))) << x;
    EXPECT_TRUE(close(exp2_flushed(x), std::exp2(static_cast<double>(x)))) << x;
    EXPECT_NEAR(log2_flushed(positive), std::log2(static_cast<double>(positive)),
                std::max(0x1p-23, std::fabs(std::log2(static_cast<double>(positive))) * 0x1p-23));
    const double turns = static_cast<double>(x) * 6.283185307179586;
    EXPECT_NEAR(sin_revolutions(x), std::sin(turns), 1e-6) << x;
    EXPECT_NEAR(cos_revolutions(x), std::cos(turns), 1e-6) << x;
  }
  EXPECT_EQ(eval_f("v_exp_f32_e32 v9, v0", 3.0f), 8.0f);
  EXPECT_EQ(eval_f("v_exp_f32_e32 v9, v0", -130.0f), 0.0f);  // the result is denormal
  EXPECT_EQ(eval_f("v_exp_f32_e32 v9, v0", -kInf), 0.0f);
  EXPECT_EQ(eval_f("v_log_f32_e32 v9, v0", 8.0f), 3.0f);
  EXPECT_EQ(eval_f("v_log_f32_e32 v9, v0", kDenormal), -kInf);
  EXPECT_EQ(eval_f("v_rcp_f32_e32 v9, v0", -0.0f), -kInf);
  EXPECT_EQ(eval_f("v_rcp_f32_e32 v9, v0", kDenormal), kInf);
  EXPECT_EQ(eval_f("v_rsq_f32_e32 v9, v0", 4.0f), 0.5f);
  EXPECT_EQ(eval_f("v_sqrt_f32_e32 v9, v0", 4.0f), 2.0f);
  EXPECT_EQ(eval_f("v_sqrt_f32_e32 v9, v0", kDenormal), 0.0f);
  EXPECT_NEAR(eval_f("v_sin_f32_e32 v9, v0", 0.25f), 1.0f, 1e-6);  // a quarter of a revolution
  EXPECT_NEAR(eval_f("v_cos_f32_e32 v9, v0", 0.5f), -1.0f, 1e-6);
}

TEST(VectorFloat, OutputModifiers) {
  EXPECT_EQ(eval_f("v_add_f32_e64 v9, v0, v1 clamp", 3.0f, 2.0f), 1.0f);
  EXPECT_EQ(eval_f("v_add_f32_e64 v9, v0, v1 clamp", -3.0f, 2.0f), 0.0f);
  EXPECT_EQ(eval_f("v_add_f32_e64 v9, v0, v1 clamp", kNan, 2.0f), 0.0f);
  EXPECT_EQ(eval_f("v_add_f32_e64 v9, v0, v1 mul:2", 3.0f, 2.0f), 10.0f);
  EXPECT_EQ(eval_f("v_add_f32_e64 v9, v0, v1 div:2", 3.0f, 2.0f), 2.5f);
}

// The sequence that compilers emit for an exact quotient.
float divide(float numerator, float denominator) {
  Snippet snippet(
      "v_div_scale_f32 v2, s[10:11], v1, v1, v0\n"  // denominator
      "v_div_scale_f32 v3, vcc, v0, v1, v0\n"       // numerator
      "v_rcp_f32_e32 v4, v2\n"
      "v_fma_f32 v5, -v2, v4, 1.0\n"
      "v_fma_f32 v4, v5, v4, v4\n"
      "v_mul_f32_e32 v5, v3, v4\n"
      "v_fma_f32 v6, -v2, v5, v3\n"
      "v_fma_f32 v5, v6, v4, v5\n"
      "v_fma_f32 v6, -v2, v5, v3\n"
      "v_div_fmas_f32 v6, v6, v4, v5\n"
      "v_div_fixup_f32 v9, v6, v1, v0");
  return snippet.vf(0, numerator).vf(1, denominator).run().out_f(9);
}
TEST(VectorFloat, DivisionSequenceIsExact) {
  dsv4::testing::Random random(5);
  for (int i = 0; i < 4000; ++i) {
    const auto any = [&] { return std::bit_cast<float>(static_cast<uint32_t>(random.bits())); };
    const float a = any(), b = any();
    const float expected = a / b, actual = divide(a, b);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(actual)) << a << " / " << b;
    } else {
      EXPECT_EQ(std::bit_cast<uint32_t>(actual), std::bit_cast<uint32_t>(expected))
          << a << " / " << b;
    }
  }
  EXPECT_EQ(divide(1.0f, 0.0f), kInf);
  EXPECT_EQ(divide(-1.0f, kInf), -0.0f);
  EXPECT_TRUE(std::isnan(divide(0.0f, 0.0f)));
  EXPECT_EQ(divide(0x1p-149f, 0x1p-149f), 1.0f);
  EXPECT_EQ(divide(0x1.fffffep127f, 0x1p-149f), kInf);
  EXPECT_EQ(divide(0x1p-149f, 0x1p127f), 0.0f);
}

TEST(VectorFloat, Double) {
  EXPECT_EQ(eval_d("v_add_f64 v[8:9], v[0:1], v[2:3]", 1e300, 1.0), 1e300 + 1.0);
  EXPECT_EQ(eval_d("v_mul_f64 v[8:9], v[0:1], -v[2:3]", 3.0, 0.1), -(3.0 * 0.1));
  EXPECT_EQ(eval_d("v_fma_f64 v[8:9], v[0:1], v[2:3], v[4:5]", 3.0, 0.1, 7.0),
            std::fma(3.0, 0.1, 7.0));
  EXPECT_EQ(eval_d("v_max_f64 v[8:9], v[0:1], 0.5", 0.25), 0.5);
  EXPECT_EQ(eval_d("v_rndne_f64_e32 v[8:9], v[0:1]", 2.5), 2.0);
  EXPECT_EQ(eval_d("v_fract_f64_e32 v[8:9], v[0:1]", -0.25), 0.75);
  EXPECT_EQ(eval_d("v_ldexp_f64 v[8:9], v[0:1], 4", 1.5), 24.0);
  EXPECT_EQ(eval_d("v_rsq_f64_e32 v[8:9], v[0:1]", 4.0), 0.5);
  EXPECT_EQ(eval_d("v_rcp_f64_e32 v[8:9], v[0:1]", 4.0), 0.25);
  Snippet fmac(
      "v_fmac_f64_e32 v[8:9], 0x40590000, v[0:1]");  // the literal is the upper half of 100.0
  EXPECT_EQ(fmac.vd(0, 2.0).vd(8, 1.0).run().out_d(8), 201.0);
}

TEST(VectorFloat, Compare) {
  const auto compare = [](const std::string& name, float a, float b) {
    Snippet snippet("v_cmp_" + name + "_f32_e64 s[10:11], v0, v1");
    snippet.vf(0, a).vf(1, b);
    snippet.wave.set_exec(0x5);
    const uint64_t mask = snippet.run().wave.scalar64(10);
    EXPECT_TRUE(mask == 0 || mask == 0x5) << name;  // lanes that are off give 0
    return mask != 0;
  };
  struct Case {
    const char* name;
    bool less, equal, greater, unordered;
  };
  // Rows: what a < b, a == b, a > b and NaN give.
  constexpr Case kCases[] = {
      {"lt", true, false, false, false}, {"le", true, true, false, false},
      {"eq", false, true, false, false}, {"gt", false, false, true, false},
      {"ge", false, true, true, false},  {"lg", true, false, true, false},
      {"o", true, true, true, false},    {"u", false, false, false, true},
      {"nlt", false, true, true, true},  {"nle", false, false, true, true},
      {"neq", true, false, true, true},  {"ngt", true, true, false, true},
      {"nge", true, false, false, true}, {"nlg", false, true, false, true},
  };
  for (const Case& c : kCases) {
    EXPECT_EQ(compare(c.name, 1, 2), c.less) << c.name;
    EXPECT_EQ(compare(c.name, 2, 2), c.equal) << c.name;
    EXPECT_EQ(compare(c.name, 3, 2), c.greater) << c.name;
    EXPECT_EQ(compare(c.name, kNan, 2), c.unordered) << c.name;
  }
  const auto class_of = [](float x) {
    for (uint32_t bit = 0; bit < 10; ++bit) {
      Snippet snippet("v_cmp_class_f32_e32 vcc, v0, v1");
      if (snippet.vf(0, x).v(1, 1u << bit).run().wave.vcc() != 0) return static_cast<int>(bit);
    }
    return -1;
  };
  EXPECT_EQ(class_of(std::bit_cast<float>(0x7fa00000u)), 0);
  EXPECT_EQ(class_of(kNan), 1);
  EXPECT_EQ(class_of(-kInf), 2);
  EXPECT_EQ(class_of(-1.0f), 3);
  EXPECT_EQ(class_of(-kDenormal), 4);
  EXPECT_EQ(class_of(-0.0f), 5);
  EXPECT_EQ(class_of(0.0f), 6);
  EXPECT_EQ(class_of(kDenormal), 7);
  EXPECT_EQ(class_of(1.0f), 8);
  EXPECT_EQ(class_of(kInf), 9);
}

TEST(VectorInteger, CompareSignedAndUnsigned) {
  const auto compare = [](const std::string& text, uint64_t a, uint64_t b) {
    Snippet snippet(text);
    snippet.v(0, static_cast<uint32_t>(a)).v(1, static_cast<uint32_t>(a >> 32));
    snippet.v(2, static_cast<uint32_t>(b)).v(3, static_cast<uint32_t>(b >> 32));
    return snippet.run().wave.vcc() != 0;
  };
  EXPECT_TRUE(compare("v_cmp_lt_i32_e32 vcc, v0, v2", 0xffffffff, 1));
  EXPECT_FALSE(compare("v_cmp_lt_u32_e32 vcc, v0, v2", 0xffffffff, 1));
  EXPECT_TRUE(compare("v_cmp_gt_u64_e32 vcc, v[0:1], v[2:3]", ~uint64_t{0}, 1));
  EXPECT_FALSE(compare("v_cmp_gt_i64_e32 vcc, v[0:1], v[2:3]", ~uint64_t{0}, 1));
  EXPECT_TRUE(compare("v_cmp_ne_u16_e32 vcc, v0, v2", 0x10001, 0x10002));
  EXPECT_TRUE(compare("v_cmp_eq_u16_e32 vcc, v0, v2", 0x10001, 0x20001));
  EXPECT_TRUE(compare("v_cmp_lt_i16_e32 vcc, v0, v2", 0x8000, 1));
}

}  // namespace
}  // namespace dsv4::amd::isa
