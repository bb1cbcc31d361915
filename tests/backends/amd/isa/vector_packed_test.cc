#include <gtest/gtest.h>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

// v[4:5] = (2, 3), v[6:7] = (10, 20), v[8:9] = (100, 200), s[10:11] = (1000, 2000).
Snippet& floats(Snippet& s) {
  s.vf(4, 2).vf(5, 3).vf(6, 10).vf(7, 20).vf(8, 100).vf(9, 200);
  s.s(10, std::bit_cast<uint32_t>(1000.0f)).s(11, std::bit_cast<uint32_t>(2000.0f));
  return s;
}
std::pair<float, float> pair(const std::string& text) {
  Snippet snippet(text);
  floats(snippet).run();
  return {snippet.out_f(0), snippet.out_f(1)};
}
using Pair = std::pair<float, float>;

TEST(VectorPacked, Floats) {
  EXPECT_EQ(pair("v_pk_add_f32 v[0:1], v[4:5], v[6:7]"), Pair(12, 23));
  EXPECT_EQ(pair("v_pk_mul_f32 v[0:1], v[4:5], v[6:7]"), Pair(20, 60));
  EXPECT_EQ(pair("v_pk_fma_f32 v[0:1], v[4:5], v[6:7], v[8:9]"), Pair(120, 260));
  EXPECT_EQ(pair("v_pk_add_f32 v[0:1], v[4:5], s[10:11]"), Pair(1002, 2003));
  EXPECT_EQ(pair("v_pk_add_f32 v[0:1], v[4:5], s[10:11] op_sel_hi:[0,1]"), Pair(1002, 2002));
  EXPECT_EQ(pair("v_pk_add_f32 v[0:1], v[4:5], v[6:7] op_sel:[1,0] op_sel_hi:[0,1]"), Pair(13, 22));
  EXPECT_EQ(pair("v_pk_add_f32 v[0:1], v[4:5], v[6:7] neg_lo:[0,1] neg_hi:[1,0]"), Pair(-8, 17));
  EXPECT_EQ(pair("v_pk_mul_f32 v[0:1], v[4:5], 4.0 op_sel_hi:[1,0]"), Pair(8, 12));
  EXPECT_EQ(pair("v_pk_mov_b32 v[0:1], v[4:5], v[6:7] op_sel:[1,0]"), Pair(3, 10));
  EXPECT_EQ(pair("v_pk_mov_b32 v[0:1], v[4:5], v[6:7] op_sel:[0,1]"), Pair(2, 20));
  EXPECT_NE(
      fault_of([] { pair("v_pk_mul_f32 v[0:1], v[4:5], 4.0"); }).find("upper half of a constant"),
      std::string::npos);
}

TEST(VectorPacked, DestinationMayBeASource) {
  Snippet snippet("v_pk_add_f32 v[4:5], v[4:5], v[4:5] op_sel:[1,1] op_sel_hi:[0,0]");
  floats(snippet).run();
  EXPECT_EQ(snippet.out_f(4), 6);
  EXPECT_EQ(snippet.out_f(5), 4);
}

TEST(VectorPacked, Halves) {
  EXPECT_EQ(eval("v_pk_add_f16 v9, v0, v1", 0x3c004000, 0x40003c00), 0x42004200u);
  EXPECT_EQ(eval("v_pk_add_f16 v9, v0, v1 op_sel:[1,0] op_sel_hi:[0,1]", 0x3c004000, 0x40003c00),
            0x44004000u);
  EXPECT_EQ(eval("v_pk_mul_f16 v9, v0, v1 neg_lo:[1,0]", 0x3c004000, 0x40003c00), 0x4000c000u);
  EXPECT_EQ(eval("v_pk_fma_f16 v9, v0, v1, v2", 0x3c004000, 0x40003c00, 0x3c003c00), 0x42004200u);
  EXPECT_EQ(eval("v_pk_max_f16 v9, v0, v1", 0x3c004000, 0x40003c00), 0x40004000u);
  // A constant half fills the low half of its register only.
  EXPECT_EQ(eval("v_pk_add_f16 v9, v0, 1.0", 0x3c003c00), 0x3c004000u);
  EXPECT_EQ(eval("v_pk_add_f16 v9, v0, 1.0 op_sel_hi:[1,0]", 0x3c003c00), 0x40004000u);
}

TEST(VectorPacked, Integers) {
  EXPECT_EQ(eval("v_pk_add_u16 v9, v0, v1", 0x0001ffff, 0x00020001), 0x00030000u);
  EXPECT_EQ(eval("v_pk_sub_i16 v9, v0, v1", 0x00010000, 0x00020001), 0xffffffffu);
  EXPECT_EQ(eval("v_pk_mul_lo_u16 v9, v0, v1", 0x00030100, 0x00020101), 0x00060100u);
  EXPECT_EQ(eval("v_pk_mad_u16 v9, v0, v1, v2", 0x00030002, 0x00040005, 0x00010001), 0x000d000bu);
  EXPECT_EQ(eval("v_pk_lshlrev_b16 v9, 4, v1 op_sel_hi:[0,1]", 0, 0xf00f000f), 0x00f000f0u);
  EXPECT_EQ(eval("v_pk_ashrrev_i16 v9, 4, v1 op_sel_hi:[0,1]", 0, 0x80000100), 0xf8000010u);
  EXPECT_EQ(eval("v_pk_min_i16 v9, v0, v1", 0x8000ffff, 0x00010001), 0x8000ffffu);
  EXPECT_EQ(eval("v_pk_max_u16 v9, v0, v1", 0x8000ffff, 0x00010001), 0x8000ffffu);
}

TEST(VectorPacked, DotProducts) {
  EXPECT_EQ(eval("v_dot4_i32_i8 v9, v0, v1, v2", 0x01ff0203, 0x02030405, 100),
            100u + 2 - 3 + 8 + 15);
  EXPECT_EQ(eval("v_dot4_u32_u8 v9, v0, v1, v2", 0x01ff0203, 0x02030405, 100),
            100u + 2 + 765 + 8 + 15);
  EXPECT_EQ(eval("v_dot2_i32_i16 v9, v0, v1, v2", 0xffff0002, 0x00030004, 1), 6u);
  EXPECT_EQ(eval("v_dot2_f32_f16 v9, v0, v1, v2", 0x40003c00, 0x42004000, 0x3f800000),
            0x41100000u);  // 9
  EXPECT_EQ(eval("v_dot2_f32_bf16 v9, v0, v1, v2", 0x40003f80, 0x40404000, 0x3f800000),
            0x41100000u);  // 9
  Snippet accumulate("v_dot2c_f32_f16_e32 v9, v0, v1");
  EXPECT_EQ(accumulate.v(0, 0x40003c00).v(1, 0x42004000).vf(9, 2.0f).run().out_f(9), 10.0f);
}

TEST(VectorPacked, MixedPrecision) {
  // a: half 2 in the upper half, b: float 3, c: half 1 in the lower half.
  Snippet mix("v_fma_mix_f32 v9, v0, v1, v2 op_sel:[1,0,0] op_sel_hi:[1,0,1]");
  EXPECT_EQ(mix.v(0, 0x4000abcd).vf(1, 3.0f).v(2, 0x3c00).run().out_f(9), 7.0f);
  Snippet negated("v_fma_mix_f32 v9, -v0, v1, |v2| op_sel_hi:[1,0,1]");
  EXPECT_EQ(negated.v(0, 0x4000).vf(1, 3.0f).v(2, 0xbc00).run().out_f(9), -5.0f);
  Snippet low("v_fma_mixlo_f16 v9, v0, v1, v2");
  EXPECT_EQ(low.vf(0, 2).vf(1, 3).vf(2, 1).v(9, 0x11112222).run().out(9), 0x11114700u);
  Snippet high("v_fma_mixhi_f16 v9, v0, v1, v2");
  EXPECT_EQ(high.vf(0, 2).vf(1, 3).vf(2, 1).v(9, 0x11112222).run().out(9), 0x47002222u);
}

}  // namespace
}  // namespace dsv4::amd::isa
