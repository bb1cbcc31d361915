#include <gtest/gtest.h>

#include <vector>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

constexpr uint32_t kOld = 1000;

// v9 = 1000 before; v0 = lane + 1.
std::vector<uint32_t> moved(const std::string& modifiers, uint64_t exec = ~uint64_t{0}) {
  Snippet snippet("v_mov_b32_dpp v9, v0 " + modifiers);
  snippet.v(0, [](int lane) { return static_cast<uint32_t>(lane + 1); }).v(9, kOld);
  snippet.wave.set_exec(exec);
  snippet.run();
  return {snippet.wave.vector[9], snippet.wave.vector[9] + kWaveSize};
}

// expected(lane): the lane that is read, or -1 for none.
void expect_sources(const std::string& pattern, const std::function<int(int)>& expected) {
  const std::string masks = " row_mask:0xf bank_mask:0xf";
  const auto keep = moved(pattern + masks), zero = moved(pattern + masks + " bound_ctrl:1");
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const int source = expected(lane);
    EXPECT_EQ(keep[static_cast<size_t>(lane)],
              source < 0 ? kOld : static_cast<uint32_t>(source + 1))
        << pattern << " " << lane;
    EXPECT_EQ(zero[static_cast<size_t>(lane)], source < 0 ? 0u : static_cast<uint32_t>(source + 1))
        << pattern << " " << lane;
  }
}

TEST(Dpp, Patterns) {
  expect_sources("quad_perm:[1,0,3,2]", [](int l) { return l ^ 1; });
  expect_sources("quad_perm:[2,2,2,2]", [](int l) { return l / 4 * 4 + 2; });
  expect_sources("row_shl:3", [](int l) { return l % 16 + 3 < 16 ? l + 3 : -1; });
  expect_sources("row_shr:1", [](int l) { return l % 16 >= 1 ? l - 1 : -1; });
  expect_sources("row_ror:4", [](int l) { return l / 16 * 16 + (l + 12) % 16; });
  expect_sources("row_mirror", [](int l) { return l / 16 * 16 + 15 - l % 16; });
  expect_sources("row_half_mirror", [](int l) { return l / 8 * 8 + 7 - l % 8; });
  expect_sources("row_bcast:15", [](int l) { return l / 16 * 16 - 1; });
  expect_sources("row_bcast:31", [](int l) { return l < 32 ? -1 : 31; });
  expect_sources("row_newbcast:5", [](int l) { return l / 16 * 16 + 5; });
  expect_sources("wave_shr:1", [](int l) { return l - 1; });
  expect_sources("wave_shl:1", [](int l) { return l < 63 ? l + 1 : -1; });
  expect_sources("wave_rol:1", [](int l) { return (l + 1) % 64; });
  expect_sources("wave_ror:1", [](int l) { return (l + 63) % 64; });
}

TEST(Dpp, MasksAndDisabledLanes) {
  const auto rows = moved("quad_perm:[0,1,2,3] row_mask:0xa bank_mask:0xf");
  for (int lane = 0; lane < kWaveSize; ++lane) {
    EXPECT_EQ(rows[static_cast<size_t>(lane)],
              lane / 16 % 2 == 1 ? static_cast<uint32_t>(lane + 1) : kOld)
        << lane;
  }
  const auto banks = moved("quad_perm:[0,1,2,3] row_mask:0xf bank_mask:0x2");
  for (int lane = 0; lane < kWaveSize; ++lane) {
    EXPECT_EQ(banks[static_cast<size_t>(lane)],
              lane / 4 % 4 == 1 ? static_cast<uint32_t>(lane + 1) : kOld)
        << lane;
  }
  // Lane 1 reads lane 0, which is off.
  const auto off = moved("row_shr:1 row_mask:0xf bank_mask:0xf", ~uint64_t{1});
  EXPECT_EQ(off[0], kOld);
  EXPECT_EQ(off[1], kOld);
  EXPECT_EQ(off[2], 2u);
  EXPECT_EQ(moved("row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1", ~uint64_t{1})[1], 0u);
}

TEST(Dpp, AppliesToTheFirstSource) {
  Snippet snippet("v_sub_f32_dpp v9, -v0, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf");
  snippet.v(0, [](int lane) { return std::bit_cast<uint32_t>(static_cast<float>(lane)); })
      .vf(1, 100)
      .run();
  EXPECT_EQ(snippet.out_f(9, 4), -5.0f - 100.0f);
}

TEST(Sdwa, SelectsAndPlaces) {
  EXPECT_EQ(eval("v_add_u32_sdwa v9, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 "
                 "src1_sel:WORD_1",
                 0x00ab0000, 0x12340000),
            0x12dfu);
  EXPECT_EQ(eval("v_add_u32_sdwa v9, sext(v0), v1 dst_sel:DWORD dst_unused:UNUSED_PAD "
                 "src0_sel:BYTE_0 src1_sel:DWORD",
                 0xff, 1),
            0u);
  EXPECT_EQ(
      eval("v_mov_b32_sdwa v9, v0 dst_sel:BYTE_2 dst_unused:UNUSED_PAD src0_sel:BYTE_0", 0xabcd),
      0x00cd0000u);
  EXPECT_EQ(eval("v_mov_b32_sdwa v9, v0 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0",
                 0xabcd),
            0xabcd2222u);
  EXPECT_EQ(
      eval("v_mov_b32_sdwa v9, v0 dst_sel:BYTE_1 dst_unused:UNUSED_SEXT src0_sel:BYTE_0", 0x80),
      0xffff8000u);
  EXPECT_EQ(eval("v_add_f16_sdwa v9, -v0, |v1| dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 "
                 "src1_sel:WORD_1",
                 0x3c000000, 0xc0000000),
            0x3c00u);
  Snippet compare("v_cmp_lt_i32_sdwa s[10:11], sext(v0), sext(v1) src0_sel:WORD_1 src1_sel:WORD_0");
  EXPECT_EQ(compare.v(0, 0xffff0000).v(1, 1).run().wave.scalar64(10), ~uint64_t{0});
}

TEST(Lanes, ReadAndWrite) {
  Snippet snippet(
      "v_readlane_b32 s0, v0, 7\nv_readfirstlane_b32 s1, v0\nv_writelane_b32 v9, s0, s2");
  snippet.v(0, [](int lane) { return static_cast<uint32_t>(lane * 10); }).v(9, 5).s(2, 64 + 3);
  snippet.wave.set_exec(0xff00);
  snippet.run();
  EXPECT_EQ(snippet.wave.scalar[0], 70u);
  EXPECT_EQ(snippet.wave.scalar[1], 80u);  // the first lane that is on
  EXPECT_EQ(snippet.out(9, 3), 70u);       // whatever EXEC says
  EXPECT_EQ(snippet.out(9, 8), 5u);
}

TEST(Lanes, Swaps) {
  const auto values = [](int base) {
    return [=](int lane) { return static_cast<uint32_t>(base + lane); };
  };
  Snippet wide("v_permlane32_swap_b32_e32 v0, v1");
  wide.v(0, values(0)).v(1, values(100)).run();
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(wide.out(0, lane), static_cast<uint32_t>(lane));
    EXPECT_EQ(wide.out(0, lane + 32), static_cast<uint32_t>(100 + lane));
    EXPECT_EQ(wide.out(1, lane), static_cast<uint32_t>(lane + 32));
    EXPECT_EQ(wide.out(1, lane + 32), static_cast<uint32_t>(100 + lane + 32));
  }
  Snippet rows("v_permlane16_swap_b32_e32 v0, v1");
  rows.v(0, values(0)).v(1, values(100)).run();
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const bool odd = lane / 16 % 2 == 1;
    EXPECT_EQ(rows.out(0, lane), static_cast<uint32_t>(odd ? 100 + lane - 16 : lane)) << lane;
    EXPECT_EQ(rows.out(1, lane), static_cast<uint32_t>(odd ? 100 + lane : lane + 16)) << lane;
  }
  Snippet registers("v_swap_b32 v0, v1");
  registers.v(0, 1).v(1, 2);
  registers.wave.set_exec(1);
  registers.run();
  EXPECT_EQ(registers.out(0, 0), 2u);
  EXPECT_EQ(registers.out(0, 1), 1u);
}

TEST(Lanes, IndexedRegisters) {
  Snippet read(
      "s_set_gpr_idx_on s2, gpr_idx(SRC0)\nv_mov_b32_e32 v9, v0\ns_set_gpr_idx_off\nv_mov_b32_e32 "
      "v8, v0");
  read.v(0, 10).v(3, 13).s(2, 3).run();
  EXPECT_EQ(read.out(9), 13u);
  EXPECT_EQ(read.out(8), 10u);
  Snippet write("s_set_gpr_idx_on s2, gpr_idx(DST)\nv_mov_b32_e32 v4, v0\ns_set_gpr_idx_off");
  write.v(0, 10).v(4, 4).v(6, 6).s(2, 2).run();
  EXPECT_EQ(write.out(4), 4u);
  EXPECT_EQ(write.out(6), 10u);
}

}  // namespace
}  // namespace dsv4::amd::isa
