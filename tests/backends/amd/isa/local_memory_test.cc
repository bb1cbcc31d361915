#include <gtest/gtest.h>

#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

uint32_t four(int lane) {
  return static_cast<uint32_t>(4 * lane);
}
uint32_t number(int lane) {
  return static_cast<uint32_t>(lane + 100);
}

TEST(LocalMemoryOps, ReadsAndWrites) {
  Snippet s(
      "ds_write_b32 v0, v1\n"
      "ds_read_b32 v2, v0 offset:8\n"
      "ds_write_b16 v0, v3 offset:1026\n"
      "ds_read_i16 v4, v0 offset:1026\n"
      "ds_write_b8_d16_hi v0, v3 offset:2049\n"
      "ds_read_u8 v5, v0 offset:2049\n"
      "ds_read_b64 v[6:7], v0\n"
      "ds_read2_b32 v[8:9], v0 offset0:1 offset1:3\n"
      "ds_write2st64_b32 v0, v1, v3 offset0:4 offset1:8\n"
      "ds_read2st64_b32 v[10:11], v0 offset0:4 offset1:8");
  s.v(0, four).v(1, number).v(3, 0x00abff00u);
  s.wave.set_exec(0x0fffffffffffffff);  // the last lanes would read what nobody wrote
  s.run();
  EXPECT_EQ(s.out(2, 3), 105u);
  EXPECT_EQ(s.out(4, 3), 0xffffff00u);
  EXPECT_EQ(s.out(5, 3), 0xabu);
  EXPECT_EQ(s.out(7, 3), 104u);
  EXPECT_EQ(s.out(8, 3), 104u);
  EXPECT_EQ(s.out(9, 3), 106u);
  EXPECT_EQ(s.out(10, 3), 103u);
  EXPECT_EQ(s.out(11, 3), 0x00abff00u);
  Snippet wide(
      "ds_write_b128 v0, v[4:7]\n"
      "ds_read_b96 v[8:10], v0 offset:4\n"
      "ds_read2_b64 v[12:15], v0 offset0:1 offset1:0");
  wide.v(0, [](int l) { return static_cast<uint32_t>(16 * l); });
  for (int r = 0; r < 4; ++r)
    wide.v(4 + r, [=](int l) { return static_cast<uint32_t>(10 * l + r); });
  wide.run();
  EXPECT_EQ(wide.out(10, 5), 53u);
  EXPECT_EQ(wide.out(12, 5), 52u);
  EXPECT_EQ(wide.out(14, 5), 50u);
}

TEST(LocalMemoryOps, StartsPoisonedAndIsBounded) {
  Snippet fresh("ds_read_b32 v1, v0");
  EXPECT_EQ(fresh.v(0, 0).run().out(1), 0xffffffffu);
  const std::string message = fault_of([] { Snippet("ds_read_b64 v[2:3], v0").v(0, 4092).run(); });
  EXPECT_NE(message.find("out-of-bounds LDS access of 8 bytes at 4092"), std::string::npos)
      << message;
  EXPECT_NE(fault_of([] { Snippet("ds_write_b32 v0, v0 offset:65532").v(0, 0).run(); }), "");
}

TEST(LocalMemoryOps, Atomics) {
  const auto apply = [](const std::string& name, uint32_t old, uint32_t operand) {
    Snippet s("ds_write_b32 v0, v1\nds_" + name + " v3, v0, v2\nds_read_b32 v4, v0");
    s.v(0, 0).v(1, old).v(2, operand);
    s.wave.set_exec(1);
    s.run();
    EXPECT_EQ(s.out(3), old) << name;
    return s.out(4);
  };
  EXPECT_EQ(apply("add_rtn_u32", 5, 7), 12u);
  EXPECT_EQ(apply("sub_rtn_u32", 5, 7), 0xfffffffeu);
  EXPECT_EQ(apply("rsub_rtn_u32", 5, 7), 2u);
  EXPECT_EQ(apply("max_rtn_i32", 5, 0xffffffff), 5u);
  EXPECT_EQ(apply("max_rtn_u32", 5, 0xffffffff), 0xffffffffu);
  EXPECT_EQ(apply("min_rtn_i32", 5, 0xffffffff), 0xffffffffu);
  EXPECT_EQ(apply("and_rtn_b32", 6, 3), 2u);
  EXPECT_EQ(apply("or_rtn_b32", 6, 3), 7u);
  EXPECT_EQ(apply("xor_rtn_b32", 6, 3), 5u);
  EXPECT_EQ(apply("wrxchg_rtn_b32", 6, 3), 3u);
  EXPECT_EQ(apply("inc_rtn_u32", 6, 3), 0u);
  EXPECT_EQ(apply("add_rtn_f32", std::bit_cast<uint32_t>(1.0f), std::bit_cast<uint32_t>(0.5f)),
            std::bit_cast<uint32_t>(1.5f));
  Snippet sum("ds_write_b32 v0, v0\nds_add_u32 v0, v1\nds_read_b32 v2, v0");
  EXPECT_EQ(sum.v(0, 0).v(1, 3).run().out(2), 192u);
  Snippet swap("ds_write_b32 v0, v1\nds_cmpst_rtn_b32 v4, v0, v1, v2\nds_read_b32 v5, v0");
  swap.v(0, 8).v(1, 5).v(2, 9);
  swap.wave.set_exec(1);
  swap.run();
  EXPECT_EQ(swap.out(4), 5u);
  EXPECT_EQ(swap.out(5), 9u);
}

TEST(LaneExchange, Bpermute) {
  Snippet s("ds_bpermute_b32 v2, v0, v1\nds_permute_b32 v3, v0, v1");
  s.v(0, [](int l) { return static_cast<uint32_t>(4 * ((l + 5) % 64)); }).v(1, number);
  s.wave.set_exec(~uint64_t{0} >> 1);  // lane 63 is off
  s.run();
  EXPECT_EQ(s.out(2, 3), 108u);
  EXPECT_EQ(s.out(2, 58), 0u);   // reads lane 63
  EXPECT_EQ(s.out(3, 8), 103u);  // lane 3 sends to lane 8
  EXPECT_EQ(s.out(3, 4), 0u);    // lane 63 would have sent
}

TEST(LaneExchange, Swizzle) {
  const auto swizzled = [](uint32_t pattern, int lane) {
    Snippet s("ds_swizzle_b32 v2, v1 offset:" + std::to_string(pattern));
    return s.v(1, number).run().out(2, lane) - 100;
  };
  EXPECT_EQ(swizzled(0x401f, 37), 53u);                  // xor 16
  EXPECT_EQ(swizzled(0x041f, 37), 36u);                  // xor 1
  EXPECT_EQ(swizzled(0x0000, 37), 32u);                  // lane 0 of its half
  EXPECT_EQ(swizzled(0x8000 | 0b00'01'10'11, 37), 38u);  // quad: reversed
  // The encoding counts, whatever the text says.
  Snippet encoded(
      "ds_swizzle_b32 v2, v1 offset:swizzle(SWAP,16) // 000000000000: D87A401F 02000001");
  EXPECT_EQ(encoded.v(1, number).run().out(2, 1), 117u);
}

// 16 lanes read four rows of 16 columns and get a column each.
TEST(LaneExchange, TransposingReads) {
  Snippet halves("ds_read_b64_tr_b16 v[2:3], v0");
  for (uint32_t i = 0; i < 256; ++i) {
    const uint16_t value = static_cast<uint16_t>(i);  // row-major: group * 64 + row * 16 + column
    std::memcpy(halves.group.lds.write(2 * i, 2, 0), &value, 2);
  }
  halves.v(0, [](int l) { return static_cast<uint32_t>(8 * l); }).run();
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const uint32_t first = static_cast<uint32_t>(lane / 16 * 64 + lane % 16);
    EXPECT_EQ(halves.out(2, lane), first | (first + 16) << 16) << lane;
    EXPECT_EQ(halves.out(3, lane), (first + 32) | (first + 48) << 16) << lane;
  }
  Snippet bytes("ds_read_b64_tr_b8 v[2:3], v0");
  for (uint32_t i = 0; i < 512; ++i)
    *bytes.group.lds.write(i, 1, 0) = static_cast<uint8_t>(i % 128);
  bytes.v(0, [](int l) { return static_cast<uint32_t>(8 * l); }).run();
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const uint64_t value = bytes.out64(2, lane);
    for (uint32_t row = 0; row < 8; ++row) {
      EXPECT_EQ(value >> (8 * row) & 0xff, 16 * row + static_cast<uint32_t>(lane % 16)) << lane;
    }
  }
}

TEST(LocalMemoryRaces, AreFoundWithoutTiming) {
  LocalMemory lds;
  const auto race = [&](auto&& access) { return fault_of(access); };
  lds.reset(64, true);
  lds.write(0, 4, 0);
  lds.read(0, 4, 0);  // one wave is in order with itself
  EXPECT_NE(race([&] { lds.read(2, 4, 1); }).find("read after write at byte 2"), std::string::npos);
  EXPECT_NE(race([&] { lds.write(0, 1, 1); }).find("two writes at byte 0"), std::string::npos);
  lds.barrier();
  lds.read(0, 4, 1);
  lds.read(0, 4, 2);
  EXPECT_NE(race([&] { lds.write(3, 4, 1); }).find("write after read at byte 3"),
            std::string::npos);
  lds.barrier();
  EXPECT_EQ(race([&] { lds.write(3, 4, 1); }), "");
  // Many barriers: the record starts anew and forgets nothing that matters.
  for (int i = 0; i < 5000; ++i) {
    lds.barrier();
    lds.write(8, 4, i % 3);
    EXPECT_NE(race([&] { lds.read(8, 4, 5); }), "") << i;
  }
  lds.reset(64, false);
  lds.write(0, 4, 0);
  EXPECT_EQ(race([&] { lds.read(0, 4, 1); }), "");
}

}  // namespace
}  // namespace dsv4::amd::isa
