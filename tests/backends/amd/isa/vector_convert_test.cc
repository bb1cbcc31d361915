#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backends/amd/isa/half.h"
#include "core/numbers.h"
#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

uint32_t bits(float x) {
  return std::bit_cast<uint32_t>(x);
}
float f32(uint32_t x) {
  return std::bit_cast<float>(x);
}

// Value of a half by its definition.
double half_value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 10 & 31), mantissa = static_cast<int>(code & 0x3ff);
  const double sign = (code & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31)
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

TEST(Half, AllCodesAndTheirNeighbourhood) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const Half half{static_cast<uint16_t>(code)};
    const double value = half_value(code);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(half_to_f32(half)));
      continue;
    }
    ASSERT_EQ(static_cast<double>(half_to_f32(half)), value) << code;
    ASSERT_EQ(f64_to_half(value).bits, code);
    // Half way to the next code rounds to the even one, a little less rounds down.
    if ((code & 0x7fff) >= 0x7bff) continue;
    const double next = half_value(code + 1), middle = (value + next) / 2;
    ASSERT_EQ(f64_to_half(middle).bits, (code & 1) == 0 ? code : code + 1) << code;
    ASSERT_EQ(f64_to_half(std::nextafter(middle, value)).bits, code) << code;
    ASSERT_EQ(f64_to_half(std::nextafter(middle, next)).bits, code + 1) << code;
  }
  EXPECT_EQ(f64_to_half(65520.0).bits, 0x7c00u);
  EXPECT_EQ(f64_to_half(65519.0).bits, 0x7bffu);
}

TEST(VectorHalf, Arithmetic) {
  EXPECT_EQ(eval("v_add_f16_e32 v9, v0, v1", 0x3c00, 0x4000), 0x4200u);  // upper half cleared
  EXPECT_EQ(eval("v_mul_f16_e64 v9, -v0, v1", 0x3c00, 0x4000), 0xc000u);
  EXPECT_EQ(eval("v_fma_f16 v9, v0, v1, v2", 0x4000, 0x4000, 0x3c00),
            0x11114500u);  // upper half kept
  EXPECT_EQ(eval("v_max_f16_e32 v9, v0, v1", 0x7e00, 0x4000), 0x4000u);
  EXPECT_EQ(eval("v_floor_f16_e32 v9, v0", 0x3e00), 0x3c00u);
  EXPECT_EQ(eval("v_rcp_f16_e32 v9, v0", 0x4000), 0x3800u);
  EXPECT_EQ(eval("v_sqrt_f16_e32 v9, v0", 0x4400), 0x4000u);
  EXPECT_EQ(eval("v_exp_f16_e32 v9, v0", 0x4200), 0x4800u);
  EXPECT_EQ(eval("v_log_f16_e32 v9, v0", 0x4800), 0x4200u);
  EXPECT_EQ(eval("v_ldexp_f16_e32 v9, v0, v1", 0x3c00, 2), 0x4400u);
  EXPECT_EQ(eval("v_pack_b32_f16 v9, v0, v1", 0x11113c00, 0x22224000), 0x40003c00u);
  EXPECT_EQ(eval("v_pack_b32_f16 v9, v0, v1 op_sel:[1,0,0]", 0x11113c00, 0x22224000), 0x40001111u);
  Snippet fmac("v_fmac_f16_e32 v9, v0, v1");
  EXPECT_EQ(fmac.v(0, 0x4000).v(1, 0x4000).v(9, 0xabcd3c00).run().out(9), 0xabcd4500u);
}

TEST(VectorConvert, Integers) {
  EXPECT_EQ(eval("v_cvt_i32_f32_e32 v9, v0", bits(-1.9f)), 0xffffffffu);
  EXPECT_EQ(eval("v_cvt_i32_f32_e32 v9, v0", bits(3e9f)), 0x7fffffffu);
  EXPECT_EQ(eval("v_cvt_i32_f32_e32 v9, v0", bits(-3e9f)), 0x80000000u);
  EXPECT_EQ(eval("v_cvt_i32_f32_e32 v9, v0", 0x7fc00000), 0u);
  EXPECT_EQ(eval("v_cvt_u32_f32_e32 v9, v0", bits(-1.0f)), 0u);
  EXPECT_EQ(eval("v_cvt_u32_f32_e32 v9, v0", bits(5e9f)), 0xffffffffu);
  EXPECT_EQ(eval("v_cvt_flr_i32_f32_e32 v9, v0", bits(-1.5f)), 0xfffffffeu);
  EXPECT_EQ(eval("v_cvt_rpi_i32_f32_e32 v9, v0", bits(-1.5f)), 0xffffffffu);
  EXPECT_EQ(f32(eval("v_cvt_f32_u32_e32 v9, v0", 0xffffffff)), 4294967296.0f);
  EXPECT_EQ(f32(eval("v_cvt_f32_i32_e32 v9, v0", 0xffffffff)), -1.0f);
  EXPECT_EQ(f32(eval("v_cvt_f32_ubyte0_e32 v9, v0", 0x04030201)), 1.0f);
  EXPECT_EQ(f32(eval("v_cvt_f32_ubyte3_e32 v9, v0", 0x04030201)), 4.0f);
  EXPECT_EQ(eval("v_cvt_pk_u8_f32 v9, v0, 2, v2", bits(300.0f), 0, 0x11223344), 0x11ff3344u);
  EXPECT_EQ(eval("v_cvt_pk_i16_i32 v9, v0, v1", 100000, 0xfffffff0), 0xfff07fffu);
  EXPECT_EQ(eval("v_cvt_pk_u16_u32 v9, v0, v1", 100000, 7), 0x0007ffffu);
  EXPECT_EQ(eval_d("v_cvt_f64_i32_e32 v[8:9], v0", std::bit_cast<double>(uint64_t{0xfffffffe})),
            -2.0);
}

TEST(VectorConvert, Floats) {
  EXPECT_EQ(f32(eval("v_cvt_f32_f16_e32 v9, v0", 0x3e00)), 1.5f);
  EXPECT_EQ(eval("v_cvt_f16_f32_e32 v9, v0", bits(1.5f)), 0x3e00u);
  EXPECT_EQ(
      f32(eval("v_cvt_f32_f16_sdwa v9, v0 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1",
               0x3e00abcd)),
      1.5f);
  EXPECT_EQ(eval("v_cvt_pkrtz_f16_f32 v9, v0, v1", bits(2049.9f), bits(-2049.9f)),
            0xe8006800u);  // towards zero
  EXPECT_EQ(eval("v_cvt_pk_f16_f32 v9, v0, v1", bits(1.5f), bits(-2.0f)), 0xc0003e00u);
  EXPECT_EQ(eval("v_cvt_pk_bf16_f32 v9, v0, v1", bits(1.00390625f), bits(-2.0f)),
            0xc0003f80u);  // ties to even
  EXPECT_EQ(eval_d("v_cvt_f64_f32_e32 v[8:9], v0", std::bit_cast<double>(uint64_t{bits(1.5f)})),
            1.5);
}

class Fp8 : public ::testing::TestWithParam<Arch> {};
INSTANTIATE_TEST_SUITE_P(Chips, Fp8, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

float fp8_value(Arch arch, uint8_t code) {
  return arch == Arch::kGfx942 ? e4m3fnuz_to_f32(code) : e4m3_to_f32(code);
}

// All codes, from every position of a register.
TEST_P(Fp8, Decodes) {
  for (int base = 0; base < 256; base += 4) {
    const auto byte = [&](int k) { return static_cast<uint8_t>(base + k); };
    const uint32_t word = static_cast<uint32_t>(byte(0) | byte(1) << 8 | byte(2) << 16) |
                          static_cast<uint32_t>(byte(3)) << 24;
    for (int k = 0; k < 4; ++k) {
      const std::string text = "v_cvt_f32_fp8_sdwa v9, v0 src0_sel:BYTE_" + std::to_string(k);
      const float actual = f32(eval(text, word, 0, 0, GetParam())),
                  expected = fp8_value(GetParam(), byte(k));
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(actual)) << base + k;
      } else {
        EXPECT_EQ(bits(actual), bits(expected)) << base + k;
      }
    }
    Snippet pairs(
        "v_cvt_pk_f32_fp8_e32 v[4:5], v0\nv_cvt_pk_f32_fp8_sdwa v[6:7], v0 src0_sel:WORD_1",
        GetParam());
    pairs.v(0, word).run();
    for (int k = 0; k < 4; ++k) {
      const float expected = fp8_value(GetParam(), byte(k));
      if (!std::isnan(expected)) {
        EXPECT_EQ(pairs.out(4 + k), bits(expected)) << base + k;
      }
    }
  }
}

TEST_P(Fp8, EncodesToNearestEvenAndOverflowsToNan) {
  const auto encode = [&](float low, float high) {
    return eval("v_cvt_pk_fp8_f32 v9, v0, v1", bits(low), bits(high), 0, GetParam());
  };
  for (int code = 0; code < 256; ++code) {
    const float value = fp8_value(GetParam(), static_cast<uint8_t>(code));
    if (std::isnan(value)) continue;
    const uint32_t packed = encode(value, -value);
    EXPECT_EQ(packed & 0xff, static_cast<uint32_t>(code)) << code;
    const bool fnuz_zero = GetParam() == Arch::kGfx942 && value == 0;  // one zero only
    EXPECT_EQ(packed >> 8 & 0xff, static_cast<uint32_t>(fnuz_zero ? 0 : code ^ 0x80)) << code;
    EXPECT_EQ(packed >> 16, 0x1111u);  // the other half is kept
  }
  const float largest = GetParam() == Arch::kGfx942 ? 240.0f : 448.0f;
  const uint32_t nan = GetParam() == Arch::kGfx942 ? 0x80 : 0x7f;
  EXPECT_EQ(encode(largest * 1.03f, 0) & 0xff, GetParam() == Arch::kGfx942 ? 0x7fu : 0x7eu);
  EXPECT_EQ(encode(largest * 1.05f, 0) & 0xff, nan);
  EXPECT_EQ(encode(std::numeric_limits<float>::infinity(), 0) & 0xff, nan);
  EXPECT_EQ(
      eval("v_cvt_pk_fp8_f32 v9, v0, v1 op_sel:[0,0,1]", bits(0.5f), bits(0.5f), 0, GetParam()) &
          0xffff,
      0x2222u);
}

TEST(ScaledConvert, Fp8) {
  EXPECT_EQ(f32(eval("v_cvt_scalef32_f32_fp8 v9, v0, v1 op_sel:[0,1,0]", 0x00380000, bits(4.0f))),
            4.0f);  // byte 2
  Snippet pair("v_cvt_scalef32_pk_f32_fp8 v[4:5], v0, v1 op_sel:[1,0,0]");
  pair.v(0, 0xb8400000).vf(1, 0.5f).run();
  EXPECT_EQ(pair.out_f(4), 1.0f);
  EXPECT_EQ(pair.out_f(5), -0.5f);
  EXPECT_EQ(eval("v_cvt_scalef32_pk_bf16_fp8 v9, v0, v1", 0xb840, bits(0.5f)), 0xbf003f80u);
  EXPECT_EQ(eval("v_cvt_scalef32_pk_f16_fp8 v9, v0, v1", 0xb840, bits(0.5f)), 0xb8003c00u);
  EXPECT_EQ(eval("v_cvt_scalef32_pk_fp8_f32 v9, v0, v1, v2", bits(1.0f), bits(-0.5f), bits(0.5f)),
            0x1111b840u);
  EXPECT_EQ(eval("v_cvt_scalef32_pk_fp8_f32 v9, v0, v1, v2 op_sel:[0,0,0,1]", bits(1.0f),
                 bits(-0.5f), bits(0.5f)),
            0xb8402222u);
  EXPECT_EQ(eval("v_cvt_scalef32_pk_fp8_bf16 v9, v0, v1 op_sel:[0,0,1]", 0xbf003f80, bits(0.5f)),
            0xb8402222u);
  // Only powers of two are scales.
  EXPECT_NE(fault_of([] {
              eval("v_cvt_scalef32_f32_fp8 v9, v0, v1", 0x38, bits(3.0f));
            }).find("not a power of two"),
            std::string::npos);
}

TEST(ScaledConvert, Fp4) {
  for (uint32_t code = 0; code < 16; ++code) {
    Snippet pair("v_cvt_scalef32_pk_f32_fp4 v[4:5], v0, v1 op_sel:[1,1,0]");  // byte 3
    pair.v(0, (code | (15 - code) << 4) << 24).vf(1, 2.0f).run();
    EXPECT_EQ(pair.out_f(4), 2 * e2m1_to_f32(static_cast<uint8_t>(code)));
    EXPECT_EQ(pair.out_f(5), 2 * e2m1_to_f32(static_cast<uint8_t>(15 - code)));
  }
  EXPECT_EQ(eval("v_cvt_scalef32_pk_fp4_f32 v9, v0, v1, v2 op_sel:[0,0,1,1]", bits(12.0f),
                 bits(-1.0f), bits(2.0f)),
            0x97112222u);  // 6 and -0.5 into byte 3
  EXPECT_EQ(eval("v_cvt_scalef32_pk_bf16_fp4 v9, v0, v1 op_sel:[0,1,0]", 0x00970000, bits(2.0f)),
            0xbf804140u);
}

}  // namespace
}  // namespace dsv4::amd::isa
