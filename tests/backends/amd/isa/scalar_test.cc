#include <gtest/gtest.h>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

struct Outcome {
  uint64_t value;
  bool scc;
  bool operator==(const Outcome&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Outcome& o) {
  return out << "0x" << std::hex << o.value << " scc " << o.scc;
}

// s0 or s[0:1] = `text` of s[2:3] = a, s[4:5] = b, with SCC before.
Outcome run(const std::string& text, uint64_t a = 0, uint64_t b = 0, bool scc = false) {
  Snippet snippet(text);
  snippet.s64(0, 0).s64(2, a).s64(4, b);
  snippet.wave.scc = scc;
  snippet.run();
  return {snippet.wave.scalar64(0), snippet.wave.scc};
}

TEST(Scalar, Sums) {
  EXPECT_EQ(run("s_add_u32 s0, s2, s4", 0xffffffff, 2), (Outcome{1, true}));
  EXPECT_EQ(run("s_addc_u32 s0, s2, s4", 0xffffffff, 0, true), (Outcome{0, true}));
  EXPECT_EQ(run("s_sub_u32 s0, s2, s4", 1, 2), (Outcome{0xffffffff, true}));
  EXPECT_EQ(run("s_subb_u32 s0, s2, s4", 2, 1, true), (Outcome{0, false}));
  EXPECT_EQ(run("s_add_i32 s0, s2, s4", 0x7fffffff, 1), (Outcome{0x80000000, true}));
  EXPECT_EQ(run("s_sub_i32 s0, s2, s4", 5, 7), (Outcome{0xfffffffe, false}));
  EXPECT_EQ(run("s_mul_i32 s0, s2, s4", 0x10001, 0x10001, true), (Outcome{0x20001, true}));
  EXPECT_EQ(run("s_mul_hi_u32 s0, s2, s4", 0xffffffff, 0xffffffff), (Outcome{0xfffffffe, false}));
  EXPECT_EQ(run("s_mul_hi_i32 s0, s2, s4", 0xffffffff, 2), (Outcome{0xffffffff, false}));
  EXPECT_EQ(run("s_min_i32 s0, s2, s4", 0xffffffff, 1), (Outcome{0xffffffff, true}));
  EXPECT_EQ(run("s_max_u32 s0, s2, s4", 0xffffffff, 1), (Outcome{0xffffffff, true}));
  EXPECT_EQ(run("s_abs_i32 s0, s2", 0xfffffffb), (Outcome{5, true}));
  EXPECT_EQ(run("s_absdiff_i32 s0, s2, s4", 3, 10), (Outcome{7, true}));
  EXPECT_EQ(run("s_lshl3_add_u32 s0, s2, s4", 5, 2), (Outcome{42, false}));
  EXPECT_EQ(run("s_movk_i32 s0, 0xff00"), (Outcome{0xffffff00, false}));
  Snippet add("s_addk_i32 s0, 0xfff0");
  EXPECT_EQ(add.s(0, 32).run().wave.scalar[0], 16u);
  Snippet multiply("s_mulk_i32 s0, 0x10");
  EXPECT_EQ(multiply.s(0, 32).run().wave.scalar[0], 512u);
}

TEST(Scalar, BitsSetScc) {
  EXPECT_EQ(run("s_and_b32 s0, s2, s4", 0xf0, 0x0f, true), (Outcome{0, false}));
  EXPECT_EQ(run("s_or_b64 s[0:1], s[2:3], s[4:5]", 0, uint64_t{1} << 40),
            (Outcome{uint64_t{1} << 40, true}));
  EXPECT_EQ(run("s_andn2_b64 s[0:1], s[2:3], s[4:5]", 0xff, 0x0f), (Outcome{0xf0, true}));
  EXPECT_EQ(run("s_orn2_b64 s[0:1], s[2:3], -1", 0xff), (Outcome{0xff, true}));
  EXPECT_EQ(run("s_xor_b32 s0, s2, -1", 0xffffffff, 0, true), (Outcome{0, false}));
  EXPECT_EQ(run("s_nand_b32 s0, s2, s4", 0xff, 0x0f), (Outcome{0xfffffff0, true}));
  EXPECT_EQ(run("s_not_b64 s[0:1], s[2:3]", 0), (Outcome{~uint64_t{0}, true}));
  EXPECT_EQ(run("s_lshl_b64 s[0:1], s[2:3], s4", 3, 40), (Outcome{uint64_t{3} << 40, true}));
  EXPECT_EQ(run("s_lshr_b32 s0, s2, 4", 0xf, 0, true), (Outcome{0, false}));
  EXPECT_EQ(run("s_ashr_i32 s0, s2, 4", 0x80000000), (Outcome{0xf8000000, true}));
  EXPECT_EQ(run("s_ashr_i64 s[0:1], s[2:3], 40", 0x8000000000000000),
            (Outcome{0xffffffffff800000, true}));
  EXPECT_EQ(run("s_bfe_u32 s0, s2, 0x80008", 0x12345678), (Outcome{0x56, true}));
  EXPECT_EQ(run("s_bfe_i32 s0, s2, 0x80008", 0x0000ff00), (Outcome{0xffffffff, true}));
  EXPECT_EQ(run("s_bfe_u64 s[0:1], s[2:3], 0x200020", 0x123456789abcdef0),
            (Outcome{0x12345678, true}));
  EXPECT_EQ(run("s_bfe_i64 s[0:1], s[2:3], 0x200000", 0x80000000),
            (Outcome{0xffffffff80000000, true}));
  EXPECT_EQ(run("s_bfm_b32 s0, 4, 8"), (Outcome{0xf00, false}));
  EXPECT_EQ(run("s_bcnt1_i32_b64 s0, s[2:3]", 0xf0f0000000000000), (Outcome{8, true}));
  EXPECT_EQ(run("s_ff1_i32_b64 s0, s[2:3]", uint64_t{1} << 50), (Outcome{50, false}));
  EXPECT_EQ(run("s_ff1_i32_b32 s0, s2", 0), (Outcome{0xffffffff, false}));
  EXPECT_EQ(run("s_flbit_i32_b32 s0, s2", 0x10000), (Outcome{15, false}));
  EXPECT_EQ(run("s_flbit_i32 s0, s2", 0xfff00000), (Outcome{12, false}));
  EXPECT_EQ(run("s_brev_b32 s0, s2", 1), (Outcome{0x80000000, false}));
  EXPECT_EQ(run("s_sext_i32_i8 s0, s2", 0x180), (Outcome{0xffffff80, false}));
  EXPECT_EQ(run("s_sext_i32_i16 s0, s2", 0x18000), (Outcome{0xffff8000, false}));
  EXPECT_EQ(run("s_pack_ll_b32_b16 s0, s2, s4", 0x11112222, 0x33334444),
            (Outcome{0x44442222, false}));
  EXPECT_EQ(run("s_pack_lh_b32_b16 s0, s2, s4", 0x11112222, 0x33334444),
            (Outcome{0x33332222, false}));
  EXPECT_EQ(run("s_pack_hh_b32_b16 s0, s2, s4", 0x11112222, 0x33334444),
            (Outcome{0x33331111, false}));
  Snippet set("s_bitset1_b32 s0, 4\ns_bitset0_b32 s0, 0");
  EXPECT_EQ(set.s(0, 3).run().wave.scalar[0], 0x12u);
}

TEST(Scalar, SelectsAndCompares) {
  EXPECT_EQ(run("s_cselect_b32 s0, s2, s4", 1, 2, true).value, 1u);
  EXPECT_EQ(run("s_cselect_b64 s[0:1], s[2:3], -1", 1, 2, false).value, ~uint64_t{0});
  EXPECT_EQ(run("s_cmov_b32 s0, s2", 7, 0, false).value, 0u);
  EXPECT_EQ(run("s_cmov_b32 s0, s2", 7, 0, true).value, 7u);
  EXPECT_TRUE(run("s_cmp_lt_i32 s2, s4", 0xffffffff, 1).scc);
  EXPECT_FALSE(run("s_cmp_lt_u32 s2, s4", 0xffffffff, 1, true).scc);
  EXPECT_TRUE(run("s_cmp_lg_u64 s[2:3], 0", uint64_t{1} << 40).scc);
  EXPECT_TRUE(run("s_cmpk_lt_i32 s2, 0xfffe", 0xfffffffd).scc);
  EXPECT_TRUE(run("s_cmpk_gt_u32 s2, 0xfffe", 0xffff).scc);
  EXPECT_TRUE(run("s_bitcmp1_b32 s2, s4", 0x10, 4).scc);
  EXPECT_TRUE(run("s_bitcmp0_b64 s[2:3], s4", 0x10, 40).scc);
}

TEST(Scalar, ExecIsARegister) {
  Snippet snippet(
      "s_and_saveexec_b64 s[10:11], vcc\nv_mov_b32_e32 v9, 1\ns_mov_b64 exec, s[10:11]");
  snippet.s64(Wave::kVcc, 0xf0).v(9, 0).run();
  EXPECT_EQ(snippet.wave.scalar64(10), ~uint64_t{0});
  EXPECT_EQ(snippet.wave.exec(), ~uint64_t{0});
  EXPECT_TRUE(snippet.wave.scc);
  EXPECT_EQ(snippet.out(9, 3), 0u);
  EXPECT_EQ(snippet.out(9, 4), 1u);
  const auto exec_after = [](const std::string& name, uint64_t source, uint64_t exec) {
    Snippet s(name + " s[10:11], s[12:13]");
    s.s64(12, source);
    s.wave.set_exec(exec);
    return s.run().wave.exec();
  };
  EXPECT_EQ(exec_after("s_or_saveexec_b64", 0xf0, 0x0f), 0xffu);
  EXPECT_EQ(exec_after("s_andn2_saveexec_b64", 0xff, 0x0f), 0xf0u);
  EXPECT_EQ(exec_after("s_andn1_saveexec_b64", 0x0f, 0xff), 0xf0u);
  EXPECT_EQ(exec_after("s_andn2_wrexec_b64", 0xff, 0x0f), 0xf0u);
  EXPECT_EQ(exec_after("s_xor_saveexec_b64", 0xff, 0x0f), 0xf0u);
}

TEST(ScalarControl, BranchesAndLoops) {
  // s0 counts from 5 to 0, s1 adds up. Branches count words after themselves.
  Snippet loop(
      "s_add_i32 s1, s1, s0\n"
      "s_sub_u32 s0, s0, 1\n"
      "s_cmp_lg_u32 s0, 0\n"
      "s_cbranch_scc1 65532\n"
      "s_endpgm\n"
      "s_mov_b32 s1, 0");
  EXPECT_EQ(loop.s(0, 5).s(1, 0).run().wave.scalar[1], 15u);
  EXPECT_EQ(loop.wave.state, WaveState::kDone);
  const auto taken = [](const std::string& branch, bool scc, uint64_t vcc, uint64_t exec) {
    Snippet s(branch + " 1\ns_mov_b32 s0, 1\ns_nop 0");
    s.s(0, 0).s64(Wave::kVcc, vcc);
    s.wave.scc = scc;
    s.wave.set_exec(exec);
    return s.run().wave.scalar[0] == 0;
  };
  EXPECT_TRUE(taken("s_branch", false, 0, 0));
  EXPECT_TRUE(taken("s_cbranch_scc0", false, 0, 0));
  EXPECT_FALSE(taken("s_cbranch_scc0", true, 0, 0));
  EXPECT_TRUE(taken("s_cbranch_vccz", true, 0, 1));
  EXPECT_FALSE(taken("s_cbranch_vccnz", true, 0, 1));
  EXPECT_TRUE(taken("s_cbranch_vccnz", true, 2, 1));
  EXPECT_TRUE(taken("s_cbranch_execz", true, 2, 0));
  EXPECT_TRUE(taken("s_cbranch_execnz", true, 2, 1));
}

TEST(ScalarControl, ProgramCounter) {
  // A call: s_swappc to the last line, which returns behind the call.
  Snippet call(
      "s_getpc_b64 s[0:1]\n"    // 4: address of the next line
      "s_add_u32 s0, s0, 20\n"  // 24
      "s_swappc_b64 s[2:3], s[0:1]\n"
      "s_add_u32 s4, s4, 1\n"
      "s_endpgm\n"
      "s_nop 0\n"
      "s_mov_b32 s4, 100\n"  // 24
      "s_setpc_b64 s[2:3]");
  EXPECT_EQ(call.run().wave.scalar[4], 101u);
  EXPECT_NE(fault_of([] { Snippet("s_setpc_b64 s[0:1]").run(); }).find("without an instruction"),
            std::string::npos);
  EXPECT_NE(fault_of([] { Snippet("s_trap 2").run(); }).find("trap"), std::string::npos);
}

}  // namespace
}  // namespace dsv4::amd::isa
