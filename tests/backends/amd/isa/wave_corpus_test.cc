// Compiled kernels with workgroups, on both chips and in both wave orders, against host loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "backends/amd/isa/half.h"
#include "core/numbers.h"
#include "tests/backends/amd/isa/waves.h"
#include "tests/testing/guarded_buffer.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

using dsv4::testing::Random;

INSTANTIATE_TEST_SUITE_P(Chips, Waves, all_settings(), setting_name);

TEST_P(Waves, BlockSum) {
  const auto in = numbers(1024, 1000);
  std::vector<int> out(4, -1);
  const struct {
    const int* in;
    int* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("block_sum", {4}, {256}, arguments);
  for (int b = 0; b < 4; ++b)
    EXPECT_EQ(out[static_cast<size_t>(b)], std::accumulate(&in[b * 256], &in[b * 256] + 256, 0));
}

TEST_P(Waves, Rotate) {
  const auto in = numbers(256, 1000);
  std::vector<int> out(256);
  const struct {
    const int* in;
    int* out;
    int rounds, pad = 0;
  } arguments{readable(in, "in"), writable(out, "out"), 3};
  run("rotate", {1}, {256}, arguments);
  for (size_t t = 0; t < 256; ++t) EXPECT_EQ(out[t], in[(t + 3 * 65) % 256] + 3);
}

TEST_P(Waves, Transpose) {
  const auto in = numbers<float>(64 * 64, 10000);
  std::vector<float> out(64 * 64);
  const struct {
    const float* in;
    float* out;
    int size, pad = 0;
  } arguments{readable(in, "in"), writable(out, "out"), 64};
  run("transpose", {2, 2}, {256}, arguments);
  for (size_t y = 0; y < 64; ++y) {
    for (size_t x = 0; x < 64; ++x) ASSERT_EQ(out[x * 64 + y], in[y * 64 + x]);
  }
}

TEST_P(Waves, NarrowLocalMemory) {
  const auto in = numbers<uint8_t>(256, 256);
  std::vector<uint32_t> out(64);
  const struct {
    const uint8_t* in;
    uint32_t* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("narrow_local", {1}, {64}, arguments);
  std::vector<uint16_t> shorts(128);
  std::vector<uint32_t> words(512);
  for (size_t t = 0; t < 64; ++t) {
    shorts[t] = static_cast<uint16_t>(in[t] * 257);
    shorts[t + 64] = static_cast<uint16_t>(in[t] + 1000);
    for (size_t i = 0; i < 8; ++i) words[t * 8 + i] = static_cast<uint32_t>(in[t] << i);
  }
  for (size_t t = 0; t < 64; ++t) {
    uint32_t sum = words[(63 - t) * 8 + 4] + words[(63 - t) * 8 + 7];
    for (size_t i = 0; i < 4; ++i) sum = sum * 31 + in[(t * 5 + i) & 255];
    sum += static_cast<uint32_t>(static_cast<int8_t>(in[255 - t]));
    EXPECT_EQ(out[t], (sum ^ shorts[127 - t] ^ words[t * 8 + 1] ^ words[t * 8 + 3])) << t;
  }
}

TEST_P(Waves, Exchange) {
  const auto in = numbers(64, 100);
  std::vector<int> out(7 * 64);
  const struct {
    const int* in;
    int* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("exchange", {1}, {64}, arguments);
  const int sum = std::accumulate(in.begin(), in.end(), 0);
  int scan = 0, large = 0;
  for (size_t t = 0; t < 64; ++t) {
    scan += in[t];
    EXPECT_EQ(out[t], sum);
    EXPECT_EQ(out[64 + t], scan) << t;
    EXPECT_EQ(out[128 + t], in[t ^ 16]);
    EXPECT_EQ(out[192 + t], in[t ^ 1]);
    EXPECT_EQ(out[256 + t], std::count_if(in.begin(), in.end(), [](int x) { return x > 50; }));
    EXPECT_EQ(out[320 + t], in[17] + in[0]);
    EXPECT_EQ(out[384 + t], large);
    large += in[t] > 50;
  }
}

TEST_P(Waves, DivergentLoops) {
  const auto in = numbers<uint32_t>(512, 100000);
  std::vector<uint32_t> out(512);
  const struct {
    const uint32_t* in;
    uint32_t* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("collatz", {2}, {256}, arguments);
  for (size_t i = 0; i < 512; ++i) {
    uint32_t steps = 0;
    for (uint64_t x = in[i]; x > 1 && steps <= 500; ++steps) x = (x & 1) != 0 ? 3 * x + 1 : x / 2;
    EXPECT_EQ(out[i], steps) << in[i];
  }
}

int branches_reference(int x, int uniform) {
  int r = 0;
  switch (x & 7) {
    case 0:
      r = x * 3;
      break;
    case 1:
      r = x - 7;
      [[fallthrough]];
    case 2:
      r += x << 2;
      break;
    case 5:
      for (int k = 0; k < (x & 31); ++k) {
        if (k % 3 == 0) continue;
        if (k > 20) break;
        r += k * uniform;
      }
      break;
    default:
      r = -x;
  }
  if (uniform > 3) {
    for (int k = 0; k < uniform; ++k) r ^= static_cast<int>(static_cast<uint32_t>(r) << 1) | k;
  } else if (x > 100) {
    r = r * 5 + 1;
  }
  return r % 2 == 0 || x < 0 ? r : ~r;
}

TEST_P(Waves, Branches) {
  const auto in = numbers(512, 1000);
  std::vector<int> out(512);
  readable(in, "in");
  writable(out, "out");
  for (const int uniform : {0, 2, 9}) {
    const struct {
      const int* in;
      int* out;
      int uniform, pad = 0;
    } arguments{in.data(), out.data(), uniform};
    run("branches", {2}, {256}, arguments);
    for (size_t i = 0; i < 512; ++i)
      ASSERT_EQ(out[i], branches_reference(in[i], uniform)) << in[i] << " " << uniform;
  }
}

TEST_P(Waves, TablesAndIndexedRegisters) {
  constexpr int kTable[40] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4,
                              6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0, 2, 8, 8, 4, 1, 9, 7};
  const auto in = numbers(1024, 1000);
  std::vector<int> out(64);
  const struct {
    const int* in;
    int* out;
    int n, pad = 0;
  } arguments{readable(in, "in"), writable(out, "out"), 25};
  run("tables", {1}, {64}, arguments);
  for (size_t t = 0; t < 64; ++t) {
    int local[16];
    for (size_t i = 0; i < 16; ++i) local[i] = in[i * 64 + t];
    for (size_t i = 0; i < 25; ++i) local[(i * 7) & 15] += kTable[(t + i) % 40];
    EXPECT_EQ(out[t], local[25 & 15] + kTable[in[t] % 40]) << t;
  }
}

TEST_P(Waves, SizesAndNumbers) {
  std::vector<int> out(200, -1);
  int* const pointer = writable(out, "out");
  run("sizes", {3, 2, 2}, {5, 3, 2}, pointer);
  for (size_t i = 0; i < 12; ++i) EXPECT_EQ(out[i], 3 * 10000 + 5) << i;
  for (size_t i = 0; i < 30; ++i) EXPECT_EQ(out[100 + i], static_cast<int>(i));
  EXPECT_EQ(out[130], -1);
}

TEST_P(Waves, Atomics) {
  const auto in = numbers<uint32_t>(1024, 100000);
  std::vector<uint32_t> counts(64, 0), product(1, 3);
  std::vector<float> total(1, 0.0f);
  std::vector<uint64_t> largest(1, 0);
  const struct {
    const uint32_t* in;
    uint32_t* counts;
    float* total;
    uint64_t* largest;
  } arguments{readable(in, "in"), writable(counts, "counts"), writable(total, "total"),
              writable(largest, "largest")};
  LaunchOptions threaded = options();
  threaded.num_threads = 2;
  machine->run("histogram", {4}, {256}, arguments, threaded);
  std::vector<uint32_t> expected(64, 0);
  float sum = 0;
  uint64_t maximum = 0;
  for (const uint32_t x : in) {
    ++expected[x % 64];
    sum += static_cast<float>(x % 8);
    maximum = std::max(maximum, static_cast<uint64_t>(x) << 20);
  }
  EXPECT_EQ(counts, expected);
  EXPECT_EQ(total[0], sum);
  EXPECT_EQ(largest[0], maximum);
  const struct {
    const uint32_t* in;
    uint32_t* product;
  } multiply{in.data(), writable(product, "product")};
  run("multiply_all", {1}, {64}, multiply);
  uint32_t wanted = 3;
  for (size_t i = 0; i < 64; ++i) wanted *= in[i];
  EXPECT_EQ(product[0], wanted);
}

TEST_P(Waves, FlatPointers) {
  const auto a = numbers<float>(64, 100), b = numbers<float>(64, 100, 2);
  std::vector<float> out(64);
  const std::vector<const float*> in = {readable(a, "a"), readable(b, "b")};
  const std::vector<float*> outs = {writable(out, "out")};
  const struct {
    const float* const* in;
    float* const* out;
  } arguments{readable(in, "pointers in"), readable(outs, "pointers out")};
  run("flat_pointers", {1}, {64}, arguments);
  for (size_t t = 0; t < 64; ++t) EXPECT_EQ(out[t], a[t] * b[63 - t]);
}

TEST_P(Waves, RawBuffer) {
  auto data = numbers<float>(256, 100);
  const auto before = data;
  std::vector<float> out(64);
  constexpr int kBytes = 40 * 16 + 8;  // half of row 40
  const struct {
    float* data;
    int bytes, pad = 0;
    float* out;
  } arguments{writable(data, "data"), kBytes, 0, writable(out, "out")};
  run("raw_buffer", {1}, {64}, arguments);
  for (size_t t = 0; t < 64; ++t) {
    float sum = 0;
    for (size_t i = 0; i < 4; ++i) sum += 16 * t + 4 * i + 4 <= kBytes ? before[4 * t + i] : 0;
    EXPECT_EQ(out[t], sum) << t;
    EXPECT_EQ(data[4 * t + 1], t <= 40 ? 1.0f : before[4 * t + 1]) << t;
  }
}

TEST_P(Waves, Transcendental) {
  Random random(3);
  std::vector<float> in(64), out(512);
  for (float& x : in) x = static_cast<float>(random.normal() * 5);
  in[0] = -140.0f;  // exp2 is denormal: compiled code scales around the flush
  const struct {
    const float* in;
    float* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("transcendental", {1}, {64}, arguments);
  for (size_t t = 0; t < 64; ++t) {
    const double x = in[t], positive = static_cast<double>(std::fabs(in[t]) + 0.01f);
    const double expected[8] = {std::exp2(x),
                                std::exp(x),
                                std::log2(positive),
                                std::log(positive),
                                1 / std::sqrt(positive),
                                std::sqrt(positive),
                                1 / (1 + std::exp(-x)),
                                1 / positive};
    for (size_t k = 0; k < 8; ++k) {
      // A few roundings in float; for the exponentials also the rounding of the scaled argument.
      const double slack = k == 1 || k == 6 ? std::fabs(x) * 0x1p-22 : 0;
      const double absolute =
          k == 2 || k == 3 ? 0x1p-22 : 0x1p-148;  // logarithms near 0; denormals
      EXPECT_NEAR(out[8 * t + k], expected[k],
                  std::fabs(expected[k]) * (0x1p-21 + slack) + absolute)
          << k << " of " << in[t];
    }
  }
  EXPECT_EQ(out[0], 0x1p-140f);
}

TEST_P(Waves, Halves) {
  Random random(4);
  std::vector<uint16_t> a(128), b(128), out(384);
  for (size_t i = 0; i < 128; ++i) {
    a[i] = f32_to_half(static_cast<float>(random.normal())).bits;
    b[i] = f32_to_half(static_cast<float>(random.normal())).bits;
  }
  const struct {
    const uint16_t *a, *b;
    uint16_t* out;
  } arguments{readable(a, "a"), readable(b, "b"), writable(out, "out")};
  run("halves", {1}, {64}, arguments);
  const auto value = [](uint16_t bits) { return static_cast<double>(half_to_f32({bits})); };
  const auto half = [](double x) { return f64_to_half(x).bits; };
  for (size_t t = 0; t < 64; ++t) {
    const double x = value(a[t]), y = value(b[t]), x1 = value(a[t + 64]), y1 = value(b[t + 64]);
    EXPECT_EQ(out[t], half(x + y));
    EXPECT_EQ(out[64 + t], half(x1 + y1));
    EXPECT_EQ(out[128 + t], half(x1 * y1));
    EXPECT_EQ(out[192 + t],
              half(value(half(x * y)) + value(half(x + y))));  // no contraction was asked for
    EXPECT_EQ(out[256 + t], x < y ? a[t] : half(y * 0.5));
    EXPECT_EQ(out[320 + t], half(static_cast<double>(t) - x));
  }
}

TEST_P(Waves, PackedFloats) {
  Random random(5);
  std::vector<float> a = random.normals(128, 1), b = random.normals(128, 1), out(640);
  const struct {
    const float *a, *b;
    float* out;
  } arguments{readable(a, "a"), readable(b, "b"), writable(out, "out")};
  run("packed_floats", {1}, {64}, arguments);
  for (size_t i = 0; i < 128; ++i) {
    EXPECT_EQ(out[i], a[i] + b[i]);
    EXPECT_EQ(out[128 + i], a[i] * b[i]);
    EXPECT_EQ(out[256 + i], std::fma(a[i], b[i], -a[i]));
    EXPECT_EQ(out[384 + i], a[i] * 3.0f - b[i]);
    const size_t low = i & ~size_t{1};
    EXPECT_EQ(out[512 + i], (i % 2 == 0 ? b[low + 1] : a[low]) + a[low + 1]);
  }
}

TEST_P(Waves, Bf16) {
  Random random(6);
  std::vector<float> in = random.normals(128, 100);
  in[5] = 1.00390625f;
  in[6] = std::numeric_limits<float>::infinity();
  std::vector<uint16_t> out(128);
  const struct {
    const float* in;
    uint16_t* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("to_bf16", {1}, {64}, arguments);
  for (size_t i = 0; i < 128; ++i) EXPECT_EQ(out[i], f32_to_bf16(in[i]));
}

TEST_P(Waves, MatrixProduct) {
  Random random(7);
  constexpr int kK = 64;
  std::vector<uint16_t> a(16 * kK), b(64 * kK);
  for (auto& x : a) x = f32_to_bf16(static_cast<float>(random.below(15) - 7));
  for (auto& x : b) x = f32_to_bf16(static_cast<float>(random.below(15) - 7));
  dsv4::testing::GuardedBuffer c(16 * 64 * 4);
  machine->add_buffer(c.data(), static_cast<uint64_t>(c.bytes()), "c");
  const struct {
    const uint16_t *a, *b;
    float* c;
    int k, pad = 0;
  } arguments{readable(a, "a"), readable(b, "b"), c.as<float>(), kK};
  run("matmul", {4}, {64}, arguments);
  EXPECT_TRUE(c.intact());
  for (size_t row = 0; row < 16; ++row) {
    for (size_t col = 0; col < 64; ++col) {
      float expected = 0;
      for (size_t k = 0; k < kK; ++k)
        expected += bf16_to_f32(a[row * kK + k]) * bf16_to_f32(b[col * kK + k]);
      ASSERT_EQ(c.as<float>()[row * 64 + col], expected) << row << " " << col;
    }
  }
}

TEST_P(Waves, LoadsToLocalMemory) {
  if (GetParam().arch != Arch::kGfx950) GTEST_SKIP() << "gfx942 has no 16-byte LDS loads";
  const auto in = numbers<uint32_t>(320, 1 << 30);
  std::vector<uint32_t> out(64);
  const struct {
    const uint32_t* in;
    uint32_t* out;
  } arguments{readable(in, "in"), writable(out, "out")};
  run("dma", {1}, {64}, arguments);
  for (size_t t = 0; t < 64; ++t) EXPECT_EQ(out[t], in[(t * 5) % 320]);
}

// The same results and the same number of instructions on any number of threads.
TEST_P(Waves, ThreadsChangeNothing) {
  const auto in = numbers<uint32_t>(256 * 40, 100000);
  std::vector<uint32_t> out(in.size()), again(in.size());
  readable(in, "in");
  writable(out, "out");
  writable(again, "again");
  struct Arguments {
    const uint32_t* in;
    uint32_t* out;
  };
  LaunchOptions options = this->options();
  options.count_mnemonics = true;
  const RunResult one =
      machine->run("collatz", {40}, {256}, Arguments{in.data(), out.data()}, options);
  options.num_threads = 3;
  const RunResult three =
      machine->run("collatz", {40}, {256}, Arguments{in.data(), again.data()}, options);
  EXPECT_EQ(out, again);
  EXPECT_EQ(one.wave_instructions, three.wave_instructions);
  EXPECT_EQ(one.mnemonics, three.mnemonics);
  uint64_t counted = 0;
  for (const auto& [mnemonic, count] : one.mnemonics) counted += count;
  EXPECT_EQ(counted, one.wave_instructions);
  EXPECT_EQ(one.mnemonics.at("s_endpgm"), 160u);
}

}  // namespace
}  // namespace dsv4::amd::isa
