// The matrix instructions against plain products, with layouts written out independently: for every
// lane and register, which element of A, B or D it holds (AMD's published calculator; see matrix.cc
// for what is unchecked there).
#include <gtest/gtest.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "backends/amd/isa/half.h"
#include "core/numbers.h"
#include "tests/backends/amd/isa/snippet.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

using dsv4::testing::Random;

int small(Random& random) {
  return static_cast<int>(random.below(15)) - 7;
}
std::pair<uint32_t, double> draw_f32(Random& r) {
  const int x = small(r);
  return {std::bit_cast<uint32_t>(static_cast<float>(x)), x};
}
std::pair<uint32_t, double> draw_bf16(Random& r) {
  const int x = small(r);
  return {f32_to_bf16(static_cast<float>(x)), x};
}
std::pair<uint32_t, double> draw_f16(Random& r) {
  const int x = small(r);
  return {f32_to_half(static_cast<float>(x)).bits, x};
}
std::pair<uint32_t, double> draw_i8(Random& r) {
  const int x = small(r);
  return {static_cast<uint8_t>(x), x};
}
std::pair<uint32_t, double> draw_ocp(Random& r) {
  const int x = small(r);
  return {f32_to_e4m3(static_cast<float>(x)), x};
}
std::pair<uint32_t, double> draw_fnuz(Random& r) {
  const int x = small(r);
  return {f32_to_e4m3fnuz(static_cast<float>(x)), x};
}

struct Case {
  const char* mnemonic;
  Arch arch;
  int m, k, blocks;
  int bits;
  std::pair<uint32_t, double> (*draw)(Random&);
  bool integer = false;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.mnemonic << " " << arch_name(c.arch);
}
constexpr Case kCases[] = {
    {"v_mfma_f32_16x16x4_f32", Arch::kGfx942, 16, 4, 1, 32, draw_f32},
    {"v_mfma_f32_32x32x2_f32", Arch::kGfx942, 32, 2, 1, 32, draw_f32},
    {"v_mfma_f32_16x16x16_bf16", Arch::kGfx942, 16, 16, 1, 16, draw_bf16},
    {"v_mfma_f32_32x32x8_bf16", Arch::kGfx942, 32, 8, 1, 16, draw_bf16},
    {"v_mfma_f32_16x16x16_bf16", Arch::kGfx950, 16, 16, 1, 16, draw_bf16},
    {"v_mfma_f32_16x16x16_f16", Arch::kGfx942, 16, 16, 1, 16, draw_f16},
    {"v_mfma_f32_32x32x8_f16", Arch::kGfx942, 32, 8, 1, 16, draw_f16},
    {"v_mfma_f32_32x32x4_2b_bf16", Arch::kGfx942, 32, 4, 2, 16, draw_bf16},
    {"v_mfma_f32_16x16x4_4b_bf16", Arch::kGfx942, 16, 4, 4, 16, draw_bf16},
    {"v_mfma_f32_4x4x4_16b_bf16", Arch::kGfx942, 4, 4, 16, 16, draw_bf16},
    {"v_mfma_f32_16x16x32_fp8_fp8", Arch::kGfx942, 16, 32, 1, 8, draw_fnuz},
    {"v_mfma_f32_32x32x16_fp8_fp8", Arch::kGfx942, 32, 16, 1, 8, draw_fnuz},
    {"v_mfma_f32_16x16x32_fp8_fp8", Arch::kGfx950, 16, 32, 1, 8, draw_ocp},
    {"v_mfma_f32_32x32x16_fp8_fp8", Arch::kGfx950, 32, 16, 1, 8, draw_ocp},
    {"v_mfma_f32_16x16x32_bf16", Arch::kGfx950, 16, 32, 1, 16, draw_bf16},
    {"v_mfma_f32_32x32x16_bf16", Arch::kGfx950, 32, 16, 1, 16, draw_bf16},
    {"v_mfma_f32_16x16x32_f16", Arch::kGfx950, 16, 32, 1, 16, draw_f16},
    {"v_mfma_f32_32x32x16_f16", Arch::kGfx950, 32, 16, 1, 16, draw_f16},
    {"v_mfma_i32_16x16x32_i8", Arch::kGfx942, 16, 32, 1, 8, draw_i8, true},
    {"v_mfma_i32_32x32x16_i8", Arch::kGfx942, 32, 16, 1, 8, draw_i8, true},
    {"v_mfma_i32_16x16x64_i8", Arch::kGfx950, 16, 64, 1, 8, draw_i8, true},
    {"v_mfma_i32_32x32x32_i8", Arch::kGfx950, 32, 32, 1, 8, draw_i8, true},
};

std::string range(const char* file, int first, int count) {
  if (count == 1) return file + std::to_string(first);
  return std::string(file) + "[" + std::to_string(first) + ":" + std::to_string(first + count - 1) +
         "]";
}

class Matrix : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Forms, Matrix, ::testing::ValuesIn(kCases), [](const auto& param) {
  return std::string(param.param.mnemonic) + "_" + arch_name(param.param.arch);
});

TEST_P(Matrix, MultipliesAndAdds) {
  const Case& c = GetParam();
  Random random(7);
  const int m = c.m, k = c.k;
  const int per_lane = m * k * c.blocks / 64, registers = per_lane * c.bits / 32,
            results = m * m * c.blocks / 64;
  const auto index = [&](int block, int row, int col, int width) {
    return static_cast<size_t>((block * m + row) * width + col);
  };
  std::vector<uint32_t> a_codes(static_cast<size_t>(c.blocks * m * k)), b_codes = a_codes;
  std::vector<double> a(a_codes.size()), b = a, d(static_cast<size_t>(c.blocks * m * m));
  for (size_t i = 0; i < a.size(); ++i) std::tie(a_codes[i], a[i]) = c.draw(random);
  for (size_t i = 0; i < b.size(); ++i) std::tie(b_codes[i], b[i]) = c.draw(random);
  for (double& x : d) x = small(random);

  // D in AGPRs, A and B in VGPRs.
  Snippet s(std::string(c.mnemonic) + " " + range("a", 4, results) + ", " +
                range("v", 0, registers) + ", " + range("v", 16, registers) + ", " +
                range("a", 4, results),
            c.arch);
  for (int r = 0; r < registers; ++r) {
    const auto pack = [&](const std::vector<uint32_t>& codes, int lane, bool is_a) {
      uint32_t word = 0;
      for (int e = 0; e < 32 / c.bits; ++e) {
        // Lanes m, 2m, ... continue along k, and then in further blocks.
        const int along = lane / m, groups = k / per_lane;
        const int kk = along % groups * per_lane + r * (32 / c.bits) + e, block = along / groups;
        const uint32_t code =
            codes[is_a ? index(block, lane % m, kk, k) : index(block, lane % m, kk, k)];
        word |= code << (c.bits % 32 * e);
      }
      return word;
    };
    s.v(r, [&](int lane) { return pack(a_codes, lane, true); });
    s.v(16 + r, [&](int lane) { return pack(b_codes, lane, false); });  // b[column][k]
  }
  const auto place = [&](int lane, int i) {  // block, row
    if (m == 4) return std::pair(lane / 4, i);
    const int per_block = m * m / 64, in_block = i % per_block;
    return std::pair(i / per_block, m == 16 ? 4 * (lane / 16) + in_block
                                            : 8 * (in_block / 4) + 4 * (lane / 32) + in_block % 4);
  };
  const auto encode = [&](double x) {
    return c.integer ? static_cast<uint32_t>(static_cast<int32_t>(x))
                     : std::bit_cast<uint32_t>(static_cast<float>(x));
  };
  for (int i = 0; i < results; ++i) {
    s.v(kFirstAccRegister + 4 + i, [&](int lane) {
      const auto [block, row] = place(lane, i);
      return encode(d[index(block, row, lane % m, m)]);
    });
  }
  s.wave.set_exec(0x5555);  // has no influence
  s.run();
  for (int i = 0; i < results; ++i) {
    for (int lane = 0; lane < kWaveSize; ++lane) {
      const auto [block, row] = place(lane, i);
      double expected = d[index(block, row, lane % m, m)];
      for (int kk = 0; kk < k; ++kk)
        expected += a[index(block, row, kk, k)] * b[index(block, lane % m, kk, k)];
      ASSERT_EQ(s.out(kFirstAccRegister + 4 + i, lane), encode(expected))
          << "row " << row << ", column " << lane % m;
    }
  }
}

// Scales are exponents, a byte for the 32 values of a lane.
TEST(ScaledMatrix, Fp8AndFp4) {
  for (const int m : {16, 32}) {
    for (const bool fp4_b : {false, true}) {
      Random random(9);
      const int k = m == 16 ? 128 : 64, results = m * m / 64;
      const std::string shape = m == 16 ? "16x16x128" : "32x32x64";
      Snippet s("v_mfma_scale_f32_" + shape + "_f8f6f4 " + range("v", 32, results) + ", v[0:7], " +
                (fp4_b ? "v[8:11]" : "v[8:15]") + ", 0, v20, v21 op_sel:[1,0,0] op_sel_hi:[0,1,0]" +
                (fp4_b ? " blgp:4" : ""));
      std::vector<double> a(static_cast<size_t>(m * k)), b = a;
      std::vector<uint32_t> a_codes(a.size()), b_codes(a.size());
      for (size_t i = 0; i < a.size(); ++i) {
        std::tie(a_codes[i], a[i]) = draw_ocp(random);
        if (fp4_b) {
          b_codes[i] = static_cast<uint32_t>(random.below(16));
          b[i] = e2m1_to_f32(static_cast<uint8_t>(b_codes[i]));
        } else {
          std::tie(b_codes[i], b[i]) = draw_ocp(random);
        }
      }
      const auto word = [&](const std::vector<uint32_t>& codes, int lane, int r, int bits) {
        uint32_t out = 0;
        for (int e = 0; e < 32 / bits; ++e) {
          out |= codes[static_cast<size_t>(lane % m * k + 32 * (lane / m) + r * (32 / bits) + e)]
                 << (bits * e);
        }
        return out;
      };
      for (int r = 0; r < 8; ++r) s.v(r, [&](int lane) { return word(a_codes, lane, r, 8); });
      for (int r = 0; r < (fp4_b ? 4 : 8); ++r) {
        s.v(8 + r, [&](int lane) { return word(b_codes, lane, r, fp4_b ? 4 : 8); });
      }
      const auto exponent = [](int lane) { return 125 + lane % 5; };
      s.v(20, [&](int lane) {
        return static_cast<uint32_t>(exponent(lane)) << 8 | 0x77000077u;
      });  // byte 1
      s.v(21, [&](int lane) {
        return static_cast<uint32_t>(exponent(lane + 2)) << 16 | 0x77u;
      });  // byte 2
      s.run();
      for (int i = 0; i < results; ++i) {
        for (int lane = 0; lane < kWaveSize; ++lane) {
          const int row = m == 16 ? 4 * (lane / 16) + i : 8 * (i / 4) + 4 * (lane / 32) + i % 4,
                    col = lane % m;
          double expected = 0;
          for (int kk = 0; kk < k; ++kk) {
            const int group = kk / 32 * m;
            expected += a[static_cast<size_t>(row * k + kk)] *
                        std::ldexp(1.0, exponent(group + row) - 127) *
                        b[static_cast<size_t>(col * k + kk)] *
                        std::ldexp(1.0, exponent(group + col + 2) - 127);
          }
          ASSERT_EQ(s.out_f(32 + i, lane), static_cast<float>(expected))
              << shape << " " << row << " " << col;
        }
      }
    }
  }
}

TEST(MatrixModifiers, AreRefused) {
  EXPECT_NE(
      fault_of([] {
        Snippet("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3] cbsz:1 abid:1").run();
      }).find("not modelled"),
      std::string::npos);
  EXPECT_NE(fault_of([] {
              Snippet("v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], v[0:3] cbsz:2").run();
            }).find("format 2"),
            std::string::npos);
}

}  // namespace
}  // namespace dsv4::amd::isa
