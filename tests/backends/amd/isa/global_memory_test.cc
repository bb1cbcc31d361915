#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "dsv4/error.h"
#include "tests/backends/amd/isa/snippet.h"

namespace dsv4::amd::isa {
namespace {

// A buffer of 256 dwords: word i holds 1000 + i. s[2:3] and v[0:1] (plus 4 * lane) point to it.
class GlobalMemoryTest : public ::testing::Test {
 protected:
  GlobalMemoryTest() : words(256) {
    for (uint32_t i = 0; i < 256; ++i) words[i] = 1000 + i;
  }
  uint64_t base() const { return reinterpret_cast<uint64_t>(words.data()); }
  void prepare(Snippet& s, bool writable = true) {
    if (writable)
      s.global.add(words.data(), 1024, true, "words");
    else
      s.global.add(words.data(), 1024, false, "words");
    s.s64(2, base());
    s.v(0, [&](int l) { return static_cast<uint32_t>(base() + 4 * static_cast<uint64_t>(l)); });
    s.v(1, [&](int l) {
      return static_cast<uint32_t>((base() + 4 * static_cast<uint64_t>(l)) >> 32);
    });
    s.v(2, [](int l) { return static_cast<uint32_t>(4 * l); });
  }
  std::vector<uint32_t> words;
};

TEST_F(GlobalMemoryTest, Loads) {
  Snippet s(
      "global_load_dword v4, v[0:1], off offset:8\n"
      "global_load_dwordx4 v[5:8], v2, s[2:3] offset:-0\n"
      "global_load_ubyte v9, v2, s[2:3] offset:1\n"
      "global_load_sbyte v10, v2, s[2:3]\n"
      "flat_load_ushort v11, v[0:1]\n"
      "flat_load_dwordx2 v[12:13], v[0:1] offset:4\n"
      "global_load_dwordx3 v[14:16], v2, s[2:3] offset:16");
  prepare(s);
  s.run();
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const uint32_t w = static_cast<uint32_t>(lane) + 1000;
    EXPECT_EQ(s.out(4, lane), w + 2);
    for (uint32_t r = 0; r < 4; ++r) EXPECT_EQ(s.out(5 + static_cast<int>(r), lane), w + r);
    EXPECT_EQ(s.out(9, lane), w >> 8 & 0xff);
    EXPECT_EQ(s.out(10, lane), static_cast<uint32_t>(static_cast<int8_t>(w)));
    EXPECT_EQ(s.out(11, lane), w);
    EXPECT_EQ(s.out(13, lane), w + 2);
    EXPECT_EQ(s.out(16, lane), w + 6);
  }
}

TEST_F(GlobalMemoryTest, Stores) {
  Snippet s(
      "global_store_dword v[0:1], v4, off\n"
      "global_store_byte v2, v4, s[2:3] offset:257\n"
      "global_store_short_d16_hi v2, v4, s[2:3] offset:514\n"
      "global_store_dwordx2 v3, v[4:5], s[2:3] offset:768");
  prepare(s);
  s.v(4, 0xabcd1234u).v(5, 77).v(3, 0);
  s.wave.set_exec(0x3);
  s.run();
  EXPECT_EQ(words[0], 0xabcd1234u);
  EXPECT_EQ(words[1], 0xabcd1234u);
  EXPECT_EQ(words[2], 1002u);
  EXPECT_EQ(words[64], ((1064u & ~0xff00u) | 0x3400u));
  EXPECT_EQ(words[128], ((1128u & 0xffffu) | 0xabcd0000u));
  EXPECT_EQ(words[192], 0xabcd1234u);
  EXPECT_EQ(words[193], 77u);
}

// Faults name the buffer, the distance and the direction.
TEST_F(GlobalMemoryTest, BoundsAreChecked) {
  Snippet beyond("global_load_dword v4, v2, s[2:3] offset:1020");
  prepare(beyond);
  const std::string message = fault_of([&] { beyond.run(); });
  EXPECT_NE(message.find("out-of-bounds read of 4 bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("nearest buffer is words"), std::string::npos) << message;
  EXPECT_NE(message.find("byte 1024 of 1024"), std::string::npos) << message;
  Snippet before("global_store_dword v2, v2, s[2:3] offset:-4");
  prepare(before);
  EXPECT_NE(fault_of([&] { before.run(); }).find("byte -4 of 1024"), std::string::npos);
  Snippet straddling("global_load_dwordx2 v[4:5], v2, s[2:3] offset:1020");
  prepare(straddling);
  EXPECT_NE(fault_of([&] { straddling.run(); }), "");
  Snippet read_only("global_store_dword v2, v2, s[2:3]");
  prepare(read_only, false);
  EXPECT_NE(fault_of([&] { read_only.run(); }).find("read-only buffer words"), std::string::npos);
  // A lane that is off may hold any address.
  Snippet off("global_load_dword v4, v2, s[2:3] offset:1020");
  prepare(off);
  off.wave.set_exec(1);
  EXPECT_EQ(off.run().out(4), 1255u);
}

TEST_F(GlobalMemoryTest, ScalarLoads) {
  Snippet s(
      "s_load_dword s10, s[2:3], 0x8\n"
      "s_load_dwordx4 s[12:15], s[2:3], s20\n"
      "s_load_dwordx2 s[16:17], s[2:3], s20 offset:0x10");
  prepare(s);
  s.s(20, 40).run();
  EXPECT_EQ(s.wave.scalar[10], 1002u);
  EXPECT_EQ(s.wave.scalar[12], 1010u);
  EXPECT_EQ(s.wave.scalar[15], 1013u);
  EXPECT_EQ(s.wave.scalar[17], 1015u);
  Snippet beyond("s_load_dwordx8 s[16:23], s[2:3], 0x3f0");
  prepare(beyond);
  EXPECT_NE(fault_of([&] { beyond.run(); }), "");
}

// Buffers of 200 bytes: what lies beyond reads as zero and is not written.
TEST_F(GlobalMemoryTest, RawBuffers) {
  const auto descriptor = [&](Snippet& s) { s.s64(4, base()).s(6, 200).s(7, 0x27000).s(8, 8); };
  Snippet load(
      "buffer_load_dword v4, v2, s[4:7], 0 offen offset:4\n"
      "buffer_load_dword v5, off, s[4:7], s8\n"
      "buffer_load_dwordx4 v[8:11], v3, s[4:7], 0 offen\n"
      "buffer_load_ushort v6, v2, s[4:7], s8 offen");
  prepare(load);
  descriptor(load);
  load.v(3, 192).run();
  EXPECT_EQ(load.out(4, 0), 1001u);
  EXPECT_EQ(load.out(4, 48), 1049u);
  EXPECT_EQ(load.out(4, 49), 0u);
  EXPECT_EQ(load.out(5, 63), 1002u);
  EXPECT_EQ(load.out(6, 1), 1003u);
  EXPECT_EQ(load.out(9), 1049u);
  EXPECT_EQ(load.out(10), 0u);
  Snippet store("buffer_store_dword v2, v2, s[4:7], 0 offen");
  prepare(store);
  descriptor(store);
  store.run();
  EXPECT_EQ(words[49], 196u);
  EXPECT_EQ(words[50], 1050u);
  Snippet atomic("buffer_atomic_add v5, v2, s[4:7], 0 offen sc0");
  prepare(atomic);
  descriptor(atomic);
  EXPECT_EQ(atomic.v(5, 5).run().out(5, 1), 4u);
  EXPECT_EQ(words[1], 9u);
}

TEST_F(GlobalMemoryTest, Atomics) {
  const auto apply = [&](const std::string& name, uint32_t old, uint32_t operand) {
    Snippet s("global_atomic_" + name + " v6, v3, v[4:5], s[2:3] sc0");
    words[0] = old;
    prepare(s);
    s.v(3, 0).v(4, operand).v(5, old);
    s.wave.set_exec(1);
    EXPECT_EQ(s.run().out(6), old) << name;
    return words[0];
  };
  EXPECT_EQ(apply("add", 5, 7), 12u);
  EXPECT_EQ(apply("sub", 5, 7), 0xfffffffeu);
  EXPECT_EQ(apply("swap", 5, 7), 7u);
  EXPECT_EQ(apply("smax", 5, 0xffffffff), 5u);
  EXPECT_EQ(apply("umax", 5, 0xffffffff), 0xffffffffu);
  EXPECT_EQ(apply("smin", 5, 0xffffffff), 0xffffffffu);
  EXPECT_EQ(apply("umin", 5, 7), 5u);
  EXPECT_EQ(apply("and", 6, 3), 2u);
  EXPECT_EQ(apply("or", 6, 3), 7u);
  EXPECT_EQ(apply("xor", 6, 3), 5u);
  EXPECT_EQ(apply("inc", 6, 6), 0u);
  EXPECT_EQ(apply("inc", 5, 6), 6u);
  EXPECT_EQ(apply("dec", 0, 6), 6u);
  EXPECT_EQ(apply("dec", 5, 6), 4u);
  EXPECT_EQ(apply("cmpswap", 5, 9), 9u);  // v5 holds the expected value
  EXPECT_EQ(apply("add_f32", std::bit_cast<uint32_t>(1.5f), std::bit_cast<uint32_t>(2.0f)),
            std::bit_cast<uint32_t>(3.5f));
  EXPECT_EQ(apply("pk_add_bf16", 0x3f803f80, 0x40003f80), 0x40404000u);
  EXPECT_EQ(apply("pk_add_f16", 0x3c003c00, 0x40003c00), 0x42004000u);
  // All lanes on one word.
  Snippet sum("global_atomic_add v3, v4, s[2:3]");
  words[0] = 0;
  prepare(sum);
  sum.v(3, 0).v(4, 2).run();
  EXPECT_EQ(words[0], 128u);
  Snippet wide("global_atomic_add_x2 v3, v[4:5], s[2:3]");
  words[0] = 0xffffffff;
  words[1] = 0;
  prepare(wide);
  wide.v(3, 0).v(4, 1).v(5, 0);
  wide.wave.set_exec(1);
  wide.run();
  EXPECT_EQ(words[1], 1u);
  Snippet misaligned("global_atomic_add v3, v4, s[2:3] offset:2");
  prepare(misaligned);
  EXPECT_NE(fault_of([&] { misaligned.v(3, 0).v(4, 0).run(); }).find("misaligned"),
            std::string::npos);
}

TEST_F(GlobalMemoryTest, FlatReachesLocalMemory) {
  Snippet s(
      "s_mov_b64 s[10:11], src_shared_base\n"
      "v_mov_b32_e32 v5, s11\n"
      "flat_store_dword v[4:5], v2\n"
      "ds_read_b32 v6, v2");
  prepare(s);
  s.v(4, [](int l) { return static_cast<uint32_t>(4 * l); }).run();
  EXPECT_EQ(s.out(6, 9), 36u);
}

// LDS-DMA: M0 is the base, lanes follow each other.
TEST_F(GlobalMemoryTest, LoadsToLocalMemory) {
  Snippet s(
      "s_mov_b32 m0, 64\n"
      "global_load_lds_dword v2, s[2:3] offset:16\n"
      "ds_read_b32 v6, v2 offset:80\n"
      "s_mov_b32 m0, 0x400\n"
      "buffer_load_dword v2, s[4:7], 0 offen lds\n"
      "ds_read_b32 v7, v2 offset:1024\n"
      "s_mov_b32 m0, 0\n"
      "global_load_lds_dwordx4 v3, s[2:3]\n"
      "ds_read_b128 v[8:11], v4");
  prepare(s);
  s.s64(4, base()).s(6, 1024).s(7, 0x27000);
  s.v(3, [](int l) { return static_cast<uint32_t>(4 * l); }).v(4, [](int l) {
    return static_cast<uint32_t>(16 * l);
  });
  s.run();
  EXPECT_EQ(s.out(6, 3), 1007u);
  EXPECT_EQ(s.out(7, 3), 1003u);
  EXPECT_EQ(s.out(11, 3), 1006u);
}

TEST(GlobalMemoryTable, RefusesOverlaps) {
  std::vector<uint32_t> words(16);
  GlobalMemory memory;
  memory.add(words.data(), 32, true, "first");
  try {
    memory.add(words.data() + 4, 32, true, "second");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("second overlaps buffer first"), std::string::npos);
  }
  memory.add(words.data() + 8, 32, false, "third");
  EXPECT_EQ(memory.find(reinterpret_cast<uint64_t>(words.data()) + 28, 4)->name, "first");
  EXPECT_EQ(memory.find(reinterpret_cast<uint64_t>(words.data()) + 28, 8), nullptr);
}

}  // namespace
}  // namespace dsv4::amd::isa
