#include "backends/amd/isa/listing.h"

#include <gtest/gtest.h>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

TEST(Listing, SplitsALine) {
  const auto code = parse_listing(
      "\n0000000000001a00 <kernel>:\n"
      "\tv_add_f32_sdwa v0, -v1, |v2| dst_sel:DWORD src0_sel:WORD_1 // 000000001A00: 02000501 "
      "06860401\n"
      "\ts_cbranch_execz 65500                                     // 000000001A08: BF88FFDC "
      "<kernel+0x10>\n"
      "\ts_endpgm\n");
  ASSERT_EQ(code.size(), 3u);
  EXPECT_EQ(code[0].mnemonic, "v_add_f32");
  EXPECT_EQ(code[0].encoding, "sdwa");
  EXPECT_EQ(code[0].operands, (std::vector<std::string>{"v0", "-v1", "|v2|"}));
  EXPECT_EQ(code[0].modifiers, (std::vector<std::string>{"dst_sel:DWORD", "src0_sel:WORD_1"}));
  EXPECT_EQ(code[0].address, 0x1a00u);
  EXPECT_EQ(code[0].words, (std::vector<uint32_t>{0x02000501, 0x06860401}));
  EXPECT_EQ(code[1].words, (std::vector<uint32_t>{0xbf88ffdc}));
  EXPECT_EQ(code[2].address, 0x1a0cu);
  EXPECT_TRUE(code[2].operands.empty());
}

TEST(Listing, KeepsListsAndCallsTogether) {
  const auto code = parse_listing(
      "\tds_swizzle_b32 v0, v1 offset:swizzle(BITMASK_PERM,\"00p11\")\n"
      "\tv_pk_fma_f32 v[0:1], v[2:3], s[4:5], v[6:7] op_sel_hi:[0,1,1] neg_hi:[1,0,0]\n"
      "\ts_waitcnt vmcnt(0) lgkmcnt(0)\n");
  ASSERT_EQ(code.size(), 3u);
  EXPECT_EQ(code[0].modifiers,
            (std::vector<std::string>{"offset:swizzle(BITMASK_PERM,\"00p11\")"}));
  EXPECT_EQ(code[1].operands.size(), 4u);
  EXPECT_EQ(code[1].modifiers, (std::vector<std::string>{"op_sel_hi:[0,1,1]", "neg_hi:[1,0,0]"}));
}

TEST(Operands, Registers) {
  const Operand pair = parse_operand("v[2:3]", OperandType::kU64);
  EXPECT_EQ(pair.kind, OperandKind::kVector);
  EXPECT_EQ(pair.reg, 2);
  EXPECT_EQ(pair.num_regs, 2);
  EXPECT_EQ(parse_operand("a7", OperandType::kB32).reg, kFirstAccRegister + 7);
  EXPECT_EQ(parse_operand("vcc", OperandType::kMask).reg, 106);
  EXPECT_EQ(parse_operand("exec_hi", OperandType::kB32).reg, 127);
  EXPECT_EQ(parse_operand("m0", OperandType::kB32).reg, 124);
  const Operand modified = parse_operand("-|v4|", OperandType::kF32);
  EXPECT_TRUE(modified.negate && modified.absolute);
  EXPECT_TRUE(parse_operand("sext(v4)", OperandType::kB32).sign_extend);
  EXPECT_EQ(parse_operand("off", OperandType::kOffset).kind, OperandKind::kNone);
}

TEST(Operands, ConstantsFollowTheType) {
  EXPECT_EQ(parse_operand("1.0", OperandType::kF32).value, 0x3f800000u);
  EXPECT_EQ(parse_operand("1.0", OperandType::kF16).value, 0x3c00u);
  EXPECT_EQ(parse_operand("-0.5", OperandType::kF64).value, 0xbfe0000000000000u);
  EXPECT_EQ(parse_operand("0.15915494", OperandType::kF32).value, 0x3e22f983u);
  EXPECT_EQ(parse_operand("-1", OperandType::kB32).value, 0xffffffffu);
  EXPECT_EQ(parse_operand("-1", OperandType::kU64).value, ~uint64_t{0});
  EXPECT_EQ(parse_operand("0x80000000", OperandType::kU64).value, 0x80000000u);
  EXPECT_EQ(parse_operand("lit(0xffffffff)", OperandType::kU64).value, 0xffffffffu);
  EXPECT_EQ(parse_operand("0x80000000", OperandType::kI64).value, 0xffffffff80000000u);
  EXPECT_EQ(parse_operand("0x40590000", OperandType::kF64).value, 0x4059000000000000u);
}

TEST(Operands, RefuseWhatTheyDoNotKnow) {
  EXPECT_NE(
      fault_of([] { parse_operand("v[0:1]", OperandType::kF32); }).find("2 registers, expected 1"),
      std::string::npos);
  EXPECT_NE(fault_of([] { parse_operand("v256", OperandType::kF32); }).find("does not exist"),
            std::string::npos);
  EXPECT_NE(
      fault_of([] { parse_operand("src_lds_direct", OperandType::kB32); }).find("not understood"),
      std::string::npos);
}

// What is not modelled is told with its reason, when it is executed and before.
TEST(Decode, NamesWhatItDoesNotKnow) {
  const auto problem = [](const std::string& line) {
    const Program program("\t" + line, Arch::kGfx942);
    return program.problem(0);
  };
  EXPECT_EQ(problem("v_no_such_thing v0, v1"), "instruction is not modelled");
  EXPECT_NE(problem("v_add_u32_e32 v0, v1").find("2 operands, expected 3"), std::string::npos);
  EXPECT_NE(problem("v_add_f32_e64 v0, v1, v2 wobble:3").find("modifier wobble:3"),
            std::string::npos);
  EXPECT_NE(problem("v_xor_b32_e64 v0, v1, v2 clamp").find("modifier clamp"), std::string::npos);
  EXPECT_NE(problem("ds_read_b32 v0, v1 gds").find("modifier gds"), std::string::npos);
  EXPECT_NE(problem("s_branch 100").find("without an instruction"), std::string::npos);
  // Chips differ.
  EXPECT_EQ(problem("v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]"),
            "instruction is not modelled");
  EXPECT_EQ(problem("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[8:9], v[0:3]"), "");
  EXPECT_EQ(problem("s_waitcnt vmcnt(0) lgkmcnt(0)"), "");
}

}  // namespace
}  // namespace dsv4::amd::isa
