// Kernels that are wrong on purpose, and launches that a device would refuse: each must be caught,
// with a message that says where.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/numbers.h"
#include "tests/backends/amd/isa/waves.h"

namespace dsv4::amd::isa {
namespace {

using dsv4::testing::Random;

class NegativeControls : public Waves {};
INSTANTIATE_TEST_SUITE_P(Chips, NegativeControls, all_settings(), setting_name);

TEST_P(NegativeControls, DroppedBarriersAreRaces) {
  const auto in = numbers(1024, 1000);
  std::vector<int> out(1024);
  const struct {
    const int* in;
    int* out;
  } sum{readable(in, "in"), writable(out, "out")};
  const std::string message = error_of("block_sum_without_barrier", {4}, {256}, sum, options());
  EXPECT_NE(message.find("LDS race"), std::string::npos) << message;
  EXPECT_NE(message.find("kernel block_sum_without_barrier"), std::string::npos) << message;
  EXPECT_NE(message.find("`ds_"), std::string::npos) << message;
  const struct {
    const int* in;
    int* out;
    int rounds, pad = 0;
  } rotate{in.data(), out.data(), 3};
  EXPECT_NE(error_of("rotate_without_barrier", {1}, {256}, rotate, options()).find("LDS race"),
            std::string::npos);
}

// Without the record of accesses the poison, or one of the two orders, shows them.
TEST_P(NegativeControls, DroppedBarriersChangeResults) {
  const auto in = numbers(1024, 1000);
  std::vector<int> out(1024);
  machine->add_read_only_buffer(in.data(), in.size() * 4, "in");
  machine->add_buffer(out.data(), out.size() * 4, "out");
  int wrong_sums = 0, wrong_rotations = 0;
  for (const WaveOrder order : {WaveOrder::kForward, WaveOrder::kReverse}) {
    LaunchOptions unchecked;
    unchecked.order = order;
    unchecked.check_races = false;
    const struct {
      const int* in;
      int* out;
    } sum{in.data(), out.data()};
    machine->run("block_sum_without_barrier", {1}, {256}, sum, unchecked);
    wrong_sums += out[0] != std::accumulate(&in[0], &in[256], 0);
    const struct {
      const int* in;
      int* out;
      int rounds, pad = 0;
    } rotate{in.data(), out.data(), 3};
    machine->run("rotate_without_barrier", {1}, {256}, rotate, unchecked);
    for (size_t t = 0; t < 256; ++t) wrong_rotations += out[t] != in[(t + 3 * 65) % 256] + 3;
  }
  EXPECT_GT(wrong_sums, 0);
  EXPECT_GT(wrong_rotations, 0);
}

struct Record {
  double d;
  int16_t s;
  uint8_t b;
  int8_t c;
  float f[3];
};
struct RecordArguments {
  const Record* in;
  Record* out;
  int n, pad = 0;
  int64_t stride;
};

TEST_P(NegativeControls, RecordsAndOffByOne) {
  Random random(2);
  constexpr int kCount = 100, kStride = 3;
  std::vector<Record> in(kCount * kStride - 2),
      out(kCount);  // ends with the last record that is read
  for (Record& r : in) {
    r = {random.normal(),
         static_cast<int16_t>(random.bits()),
         static_cast<uint8_t>(random.bits()),
         static_cast<int8_t>(random.bits()),
         {1.5f, static_cast<float>(random.normal()), 2.5f}};
  }
  const RecordArguments arguments{readable(in, "records"), writable(out, "out"), kCount, 0,
                                  kStride};
  run("records", {2}, {64}, arguments);
  for (size_t i = 0; i < kCount; ++i) {
    const Record& r = in[i * kStride];
    EXPECT_EQ(out[i].d, r.d * 2);
    EXPECT_EQ(out[i].s, static_cast<int16_t>(-r.s));
    EXPECT_EQ(out[i].b, static_cast<uint8_t>(r.b + 1));
    EXPECT_EQ(out[i].c, static_cast<int8_t>(r.c - 1));
    EXPECT_EQ(out[i].f[0], r.f[2]);
    EXPECT_EQ(out[i].f[1], r.f[0] + 1);
    EXPECT_EQ(out[i].f[2], r.f[1]);
  }
  const std::string message = error_of("records_off_by_one", {2}, {64}, arguments, options());
  EXPECT_NE(message.find("out-of-bounds read"), std::string::npos) << message;
  EXPECT_NE(message.find("nearest buffer is records"), std::string::npos) << message;
  EXPECT_NE(message.find("workgroup (1, 0, 0)"), std::string::npos) << message;
}

TEST_P(NegativeControls, Fp8NeedsItsFix) {
  std::vector<uint32_t> in(64);
  for (uint32_t i = 0; i < 64; ++i)
    in[i] = 4 * i | (4 * i + 1) << 8 | (4 * i + 2) << 16 | (4 * i + 3) << 24;
  const auto decode = [&](const std::string& kernel) {
    std::vector<float> out(256);
    machine->clear_buffers();
    const struct {
      const uint32_t* in;
      float* out;
    } arguments{readable(in, "in"), writable(out, "out")};
    run(kernel, {1}, {64}, arguments);
    int wrong = 0;
    for (size_t code = 0; code < 256; ++code) {
      const float expected = e4m3_to_f32(static_cast<uint8_t>(code));
      wrong += !std::isnan(expected) && out[code] != expected;
    }
    return wrong;
  };
  EXPECT_EQ(decode("fp8_to_f32"), 0);
  // Every code but +0 is wrong: half the value, or NaN for -0.
  EXPECT_EQ(decode("fp8_to_f32_without_fix"), GetParam().arch == Arch::kGfx942 ? 253 : 0);
}

TEST_P(NegativeControls, WhatIsNotModelledIsNamed) {
  const auto in = numbers(64, 1000);
  std::vector<int> out(64);
  const struct {
    const int* in;
    int* out;
    int n, pad = 0;
  } arguments{readable(in, "in"), writable(out, "out"), 3};
  const std::string message = error_of("uses_scratch", {1}, {64}, arguments, options());
  EXPECT_NE(message.find("private memory"), std::string::npos) << message;
  LaunchOptions bounded = options();
  bounded.max_wave_instructions = 1000;
  EXPECT_NE(error_of("endless", {1}, {64}, out.data(), bounded).find("does it end?"),
            std::string::npos);
}

TEST_P(NegativeControls, LaunchesThatADeviceRefuses) {
  const auto in = numbers(1024, 1000);
  std::vector<int> out(4);
  const struct {
    const int* in;
    int* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  const auto refused = [&](Dim3 grid, Dim3 block, uint32_t lds) {
    LaunchOptions options;
    options.dynamic_lds_bytes = lds;
    return error_of("block_sum", grid, block, arguments, options, ErrorCode::kInvalidArgument);
  };
  EXPECT_NE(refused({1}, {512}, 0).find("workgroup of 512 threads, expected 1 to 256"),
            std::string::npos);
  EXPECT_NE(refused({0}, {256}, 0).find("grid is empty"), std::string::npos);
  EXPECT_NE(refused({1}, {256}, 160 * 1024).find("bytes of LDS"), std::string::npos);
  EXPECT_NE(error_of("block_sum", {1}, {256}, in.data(), {}, ErrorCode::kInvalidArgument)
                .find("expected 16"),
            std::string::npos);
  EXPECT_NE(
      error_of("no_such", {1}, {256}, arguments, {}, ErrorCode::kNotFound).find("it has block_sum"),
      std::string::npos);
}

}  // namespace
}  // namespace dsv4::amd::isa
