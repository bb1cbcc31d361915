#include <gtest/gtest.h>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

TEST(VectorInteger, Bits) {
  EXPECT_EQ(eval("v_and_b32_e32 v9, v0, v1", 0xff00ff00, 0x0ff00ff0), 0x0f000f00u);
  EXPECT_EQ(eval("v_or_b32_e32 v9, v0, v1", 0xf0, 0x0f), 0xffu);
  EXPECT_EQ(eval("v_xor_b32_e32 v9, v0, v1", 0xff, 0x0f), 0xf0u);
  EXPECT_EQ(eval("v_xnor_b32_e32 v9, v0, v1", 0xff, 0x0f), 0xffffff0fu);
  EXPECT_EQ(eval("v_not_b32_e32 v9, v0", 0xff), 0xffffff00u);
  EXPECT_EQ(eval("v_bfi_b32 v9, v0, v1, v2", 0xffff, 0x1234abcd, 0x98765432), 0x9876abcdu);
  EXPECT_EQ(eval("v_bfe_u32 v9, v0, v1, v2", 0x12345678, 8, 12), 0x456u);
  EXPECT_EQ(eval("v_bfe_i32 v9, v0, v1, v2", 0x00000f00, 8, 4), 0xffffffffu);
  EXPECT_EQ(eval("v_bfe_i32 v9, v0, v1, v2", 0x00000700, 8, 4), 7u);
  EXPECT_EQ(eval("v_bfe_i32 v9, v0, v1, 0", 0xffffffff, 8), 0u);
  EXPECT_EQ(eval("v_bfm_b32 v9, v0, v1", 4, 8), 0xf00u);
  EXPECT_EQ(eval("v_bfrev_b32_e32 v9, v0", 0x80000003), 0xc0000001u);
  EXPECT_EQ(eval("v_bcnt_u32_b32 v9, v0, v1", 0xf0f, 100), 108u);
  EXPECT_EQ(eval("v_ffbh_u32_e32 v9, v0", 0x00010000), 15u);
  EXPECT_EQ(eval("v_ffbh_u32_e32 v9, v0", 0), 0xffffffffu);
  EXPECT_EQ(eval("v_ffbl_b32_e32 v9, v0", 0x00010000), 16u);
  EXPECT_EQ(eval("v_ffbh_i32_e32 v9, v0", 0xfff00000), 12u);
  EXPECT_EQ(eval("v_ffbh_i32_e32 v9, v0", 0xffffffff), 0xffffffffu);
  EXPECT_EQ(eval("v_alignbit_b32 v9, v0, v1, v2", 0x12345678, 0x9abcdef0, 8), 0x789abcdeu);
  EXPECT_EQ(eval("v_alignbyte_b32 v9, v0, v1, v2", 0x12345678, 0x9abcdef0, 3), 0x3456789au);
  EXPECT_EQ(eval("v_or3_b32 v9, v0, v1, v2", 1, 2, 4), 7u);
  EXPECT_EQ(eval("v_and_or_b32 v9, v0, v1, v2", 0xf0, 0x30, 1), 0x31u);
}

// Selector bytes 0-7 pick bytes (4-7 of the first source), 8-11 signs, 12 zero, above ones.
TEST(VectorInteger, PermuteBytes) {
  EXPECT_EQ(eval("v_perm_b32 v9, v0, v1, v2", 0x77665544, 0x33221100, 0x07040300), 0x77443300u);
  EXPECT_EQ(eval("v_perm_b32 v9, v0, v1, v2", 0x80008000, 0x00008000, 0x0b0a0908), 0xffff00ffu);
  EXPECT_EQ(eval("v_perm_b32 v9, v0, v1, v2", 0, 0, 0x0d0c0d0c), 0xff00ff00u);
}

// Bit 4a+2b+c of the table is the value: a gives 0xf0, b 0xcc, c 0xaa.
TEST(VectorInteger, Bitop3) {
  EXPECT_EQ(eval("v_bitop3_b32 v9, v0, v1, v2 bitop3:0xf0", 0x123, 0x456, 0x789), 0x123u);
  EXPECT_EQ(eval("v_bitop3_b32 v9, v0, v1, v2 bitop3:0xcc", 0x123, 0x456, 0x789), 0x456u);
  EXPECT_EQ(eval("v_bitop3_b32 v9, v0, v1, v2 bitop3:0xaa", 0x123, 0x456, 0x789), 0x789u);
  EXPECT_EQ(eval("v_bitop3_b32 v9, v0, v1, v2 bitop3:0x96", 0x123, 0x456, 0x789),
            0x123u ^ 0x456u ^ 0x789u);
}

TEST(VectorInteger, Shifts) {
  EXPECT_EQ(eval("v_lshlrev_b32_e32 v9, v0, v1", 36, 1), 16u);
  EXPECT_EQ(eval("v_lshrrev_b32_e32 v9, 4, v1", 0, 0x80000000), 0x08000000u);
  EXPECT_EQ(eval("v_ashrrev_i32_e32 v9, 4, v1", 0, 0x80000000), 0xf8000000u);
  EXPECT_EQ(eval("v_lshl_add_u32 v9, v0, 3, v2", 5, 0, 100), 140u);
  EXPECT_EQ(eval("v_add_lshl_u32 v9, v0, v1, 2", 5, 6), 44u);
  EXPECT_EQ(eval("v_lshl_or_b32 v9, v0, 8, v2", 5, 0, 1), 0x501u);
  EXPECT_EQ(eval("v_xad_u32 v9, v0, v1, v2", 5, 6, 10), 13u);
  EXPECT_EQ(eval64("v_lshlrev_b64 v[8:9], 40, v[2:3]", 0, 3), uint64_t{3} << 40);
  EXPECT_EQ(eval64("v_lshrrev_b64 v[8:9], 40, v[2:3]", 0, ~uint64_t{0}), 0xffffffu);
  EXPECT_EQ(eval64("v_ashrrev_i64 v[8:9], 40, v[2:3]", 0, 0x8000000000000000u),
            0xffffffffff800000u);
  EXPECT_EQ(eval64("v_lshl_add_u64 v[8:9], v[0:1], 3, v[2:3]", 0xffffffff, 1), 0x7fffffff9u);
}

TEST(VectorInteger, SumsAndSaturation) {
  EXPECT_EQ(eval("v_add_u32_e32 v9, v0, v1", 0xffffffff, 2), 1u);
  EXPECT_EQ(eval("v_subrev_u32_e32 v9, v0, v1", 3, 10), 7u);
  EXPECT_EQ(eval("v_add_u32_e64 v9, v0, v1 clamp", 0xffffffff, 2), 0xffffffffu);
  EXPECT_EQ(eval("v_sub_u32_e64 v9, v0, v1 clamp", 1, 2), 0u);
  EXPECT_EQ(eval("v_add_i32 v9, v0, v1 clamp", 0x7fffffff, 1), 0x7fffffffu);
  EXPECT_EQ(eval("v_sub_i32 v9, v0, v1 clamp", 0x80000000, 1), 0x80000000u);
  EXPECT_EQ(eval("v_add3_u32 v9, v0, v1, v2", 1, 2, 0xffffffff), 2u);
  EXPECT_EQ(eval("v_sad_u32 v9, v0, v1, v2", 3, 10, 100), 107u);
  EXPECT_EQ(eval("v_min_i32_e32 v9, v0, v1", 0xffffffff, 1), 0xffffffffu);
  EXPECT_EQ(eval("v_min_u32_e32 v9, v0, v1", 0xffffffff, 1), 1u);
  EXPECT_EQ(eval("v_med3_i32 v9, v0, v1, v2", 5, 0xffffffff, 3), 3u);
  EXPECT_EQ(eval("v_med3_u32 v9, v0, v1, v2", 5, 0xffffffff, 3), 5u);
  EXPECT_EQ(eval("v_max3_i32 v9, v0, v1, v2", 5, 0xffffffff, 3), 5u);
  EXPECT_EQ(eval("v_min3_u32 v9, v0, v1, v2", 5, 0xffffffff, 3), 3u);
}

TEST(VectorInteger, Carries) {
  // A 96-bit addition: carries run through VCC and through a pair of registers.
  Snippet sum(
      "v_add_co_u32_e32 v6, vcc, v0, v3\n"
      "v_addc_co_u32_e64 v7, s[10:11], v1, v4, vcc\n"
      "v_addc_co_u32_e64 v8, s[12:13], v2, v5, s[10:11]");
  sum.v(0, 0xffffffff).v(1, 0xffffffff).v(2, 7).v(3, 1).v(4, 0).v(5, 1).run();
  EXPECT_EQ(sum.out(6), 0u);
  EXPECT_EQ(sum.out(7), 0u);
  EXPECT_EQ(sum.out(8), 9u);
  EXPECT_EQ(sum.wave.scalar64(10), ~uint64_t{0});
  EXPECT_EQ(sum.wave.scalar64(12), 0u);
  Snippet difference(
      "v_sub_co_u32_e32 v6, vcc, v0, v2\n"
      "v_subb_co_u32_e32 v7, vcc, v1, v3, vcc\n"
      "v_subbrev_co_u32_e64 v8, s[10:11], v3, v1, vcc");
  difference.v(0, 0).v(1, 5).v(2, 1).v(3, 5).run();
  EXPECT_EQ(difference.out64(6), ~uint64_t{0});
  EXPECT_EQ(difference.out(8), 0xffffffffu);
  // Lanes that are off contribute no carry.
  Snippet masked("v_add_co_u32_e32 v6, vcc, v0, v0");
  masked.v(0, 0x80000000);
  masked.wave.set_exec(0xff00);
  EXPECT_EQ(masked.run().wave.vcc(), 0xff00u);
}

TEST(VectorInteger, Products) {
  EXPECT_EQ(eval("v_mul_lo_u32 v9, v0, v1", 0x10001, 0x10001), 0x20001u);
  EXPECT_EQ(eval("v_mul_hi_u32 v9, v0, v1", 0xffffffff, 0xffffffff), 0xfffffffeu);
  EXPECT_EQ(eval("v_mul_hi_i32 v9, v0, v1", 0xffffffff, 2), 0xffffffffu);
  EXPECT_EQ(eval("v_mul_u32_u24_e32 v9, v0, v1", 0xff000003, 5), 15u);
  EXPECT_EQ(eval("v_mul_i32_i24_e32 v9, v0, v1", 0x00ffffff, 5), 0xfffffffbu);
  EXPECT_EQ(eval("v_mad_u32_u24 v9, v0, v1, v2", 0xff000003, 5, 1), 16u);
  EXPECT_EQ(eval("v_mad_i32_i24 v9, v0, v1, v2", 0x00ffffff, 5, 1), 0xfffffffcu);
  EXPECT_EQ(eval("v_mul_hi_u32_u24_e32 v9, v0, v1", 0xffffff, 0xffffff), 0xffffu);
  Snippet wide("v_mad_u64_u32 v[8:9], s[10:11], v0, v1, v[2:3]");
  wide.v(0, 0xffffffff).v(1, 0xffffffff).v(2, 0xffffffff).v(3, 0xffffffff).run();
  EXPECT_EQ(wide.out64(8), 0xfffffffe00000000u);  // carries out
  EXPECT_EQ(wide.wave.scalar64(10), ~uint64_t{0});
  Snippet negative("v_mad_i64_i32 v[8:9], s[10:11], v0, v1, v[2:3]");
  EXPECT_EQ(negative.v(0, 0xffffffff).v(1, 3).v(2, 1).v(3, 0).run().out64(8), ~uint64_t{1});
}

TEST(VectorInteger, SixteenBits) {
  EXPECT_EQ(eval("v_add_u16_e32 v9, v0, v1", 0xabcdffff, 2), 1u);
  EXPECT_EQ(eval("v_sub_u16_e32 v9, v0, v1", 1, 2), 0xffffu);
  EXPECT_EQ(eval("v_add_u16_e64 v9, v0, v1 clamp", 0xffff, 2), 0xffffu);
  EXPECT_EQ(eval("v_mul_lo_u16_e32 v9, v0, v1", 0x1234, 0x100), 0x3400u);
  EXPECT_EQ(eval("v_ashrrev_i16_e32 v9, 4, v1", 0, 0x8000), 0xf800u);
  EXPECT_EQ(eval("v_lshlrev_b16_e32 v9, 4, v1", 0, 0xf001), 0x0010u);
  EXPECT_EQ(eval("v_min_i16_e32 v9, v0, v1", 0x8000, 1), 0x8000u);
  EXPECT_EQ(eval("v_max_u16_e32 v9, v0, v1", 0x8000, 1), 0x8000u);
  // The multiply-add keeps the upper half of its register (0x1111 here), and op_sel picks halves.
  EXPECT_EQ(eval("v_mad_u16 v9, v0, v1, v2", 3, 4, 5), 0x11110011u);
  EXPECT_EQ(eval("v_mad_u16 v9, v0, v1, v2 op_sel:[1,0,0,1]", 0x00030000, 4, 5), 0x00112222u);
  EXPECT_EQ(eval("v_mad_u32_u16 v9, v0, v1, v2", 0xffff, 0xffff, 1), 0xfffe0002u);
}

TEST(VectorInteger, Moves) {
  EXPECT_EQ(eval("v_mov_b32_e32 v9, 0x1234"), 0x1234u);
  EXPECT_EQ(eval64("v_mov_b64_e32 v[8:9], -2"), ~uint64_t{1});
  Snippet acc("v_accvgpr_write_b32 a3, v0\nv_accvgpr_mov_b32 a4, a3\nv_accvgpr_read_b32 v9, a4");
  EXPECT_EQ(acc.v(0, 77).run().out(9), 77u);
  Snippet select("v_cndmask_b32_e32 v9, v0, v1, vcc");
  select.v(0, 1).v(1, 2).s64(Wave::kVcc, 0x2);
  select.run();
  EXPECT_EQ(select.out(9, 0), 1u);
  EXPECT_EQ(select.out(9, 1), 2u);
  // A sign on a selected value is a sign bit.
  Snippet negated("v_cndmask_b32_e64 v9, -v0, v1, s[10:11]");
  EXPECT_EQ(negated.vf(0, 2.0f).vf(1, 3.0f).s64(10, 0).run().out_f(9), -2.0f);
}

TEST(VectorInteger, CountsLanesBelow) {
  Snippet count("v_mbcnt_lo_u32_b32 v9, -1, 0\nv_mbcnt_hi_u32_b32 v9, -1, v9");
  count.run();
  for (int lane = 0; lane < kWaveSize; ++lane)
    EXPECT_EQ(count.out(9, lane), static_cast<uint32_t>(lane));
  Snippet masked("v_mbcnt_lo_u32_b32 v9, s2, 0\nv_mbcnt_hi_u32_b32 v9, s3, v9");
  masked.s(2, 0xf).s(3, 0xf0).run();
  EXPECT_EQ(masked.out(9, 2), 2u);
  EXPECT_EQ(masked.out(9, 31), 4u);
  EXPECT_EQ(masked.out(9, 38), 6u);
}

TEST(VectorInteger, DisabledLanesKeepTheirValue) {
  Snippet snippet("v_add_u32_e32 v9, v0, v1\nv_lshl_add_u64 v[4:5], v[0:1], 0, v[0:1]");
  snippet.v(0, 1).v(1, 2).v(9, 50).v(4, 60).v(5, 60);
  snippet.wave.set_exec(0xf0000000000000f0);
  snippet.run();
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const bool on = (0xf0000000000000f0 >> lane & 1) != 0;
    EXPECT_EQ(snippet.out(9, lane), on ? 3u : 50u) << lane;
    EXPECT_EQ(snippet.out(5, lane), on ? 4u : 60u) << lane;
  }
}

}  // namespace
}  // namespace dsv4::amd::isa
