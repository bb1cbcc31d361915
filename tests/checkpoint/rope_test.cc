// Frequencies against the golden rows of the specification and against the values that the golden
// data was computed with.
#include "checkpoint/rope.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>

#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

const RopeParameters kMain{.theta = 10000.0};
const RopeParameters kCompress{.theta = 160000.0,
                               .yarn = true,
                               .factor = 16.0,
                               .beta_fast = 32.0,
                               .beta_slow = 1.0,
                               .original_max_position = 65536};

TEST(Rope, PairsBelowAndAboveTheRampAreExact) {
  const std::vector<float> main = rope_frequencies(kMain, 64);
  const std::vector<float> yarn = rope_frequencies(kCompress, 64);
  ASSERT_EQ(main.size(), 32u);
  ASSERT_EQ(yarn.size(), 32u);
  EXPECT_EQ(main[0], 1.0f);
  EXPECT_EQ(main[16], 0.01f);
  for (int i = 0; i < 32; ++i) {
    const double plain = std::pow(160000.0, -2.0 * i / 64);
    // The ramp of spec/attention.md 3 runs from pair 15 to pair 25.
    if (i <= 15) {
      EXPECT_EQ(yarn[static_cast<size_t>(i)], static_cast<float>(plain)) << i;
    } else if (i >= 25) {
      EXPECT_EQ(yarn[static_cast<size_t>(i)], static_cast<float>(plain / 16)) << i;
    } else {
      const double ramp = (i - 15) / 10.0;
      EXPECT_EQ(yarn[static_cast<size_t>(i)],
                static_cast<float>(plain / 16 * ramp + plain * (1 - ramp)))
          << i;
    }
  }
}

struct GoldenAngle {
  const RopeParameters& parameters;
  int position, pair;
  double cosine, sine;
};

TEST(Rope, GoldenAnglesOfTheSpecification) {
  // As printed, 8 digits, for float frequencies and float products.
  const GoldenAngle kGolden[] = {
      {kMain, 1, 0, 0.54030231, 0.84147098},
      {kMain, 1000, 16, -0.83907153, -0.54402111},
      {kMain, 65536, 31, -0.77415868, 0.63299158},
      {kCompress, 1000, 16, -0.64025384, 0.76816341},
      {kCompress, 65536, 16, -0.67845338, -0.73464346},
  };
  for (const GoldenAngle& golden : kGolden) {
    const float frequency =
        rope_frequencies(golden.parameters, 64)[static_cast<size_t>(golden.pair)];
    const float angle = static_cast<float>(golden.position) * frequency;
    // Half a unit of the last printed digit. The rows at position 65536 are printed for the float
    // angle; the others for the exact one, from which frequency and product differ by half an ulp.
    const double bound = 5.1e-9 + (golden.position < 65536 ? std::abs(double{angle}) * 0x1p-23 : 0);
    EXPECT_NEAR(std::cos(static_cast<double>(angle)), golden.cosine, bound);
    EXPECT_NEAR(std::sin(static_cast<double>(angle)), golden.sine, bound);
  }
}

int ulps(float a, float b) {
  return std::abs(std::bit_cast<int32_t>(a) - std::bit_cast<int32_t>(b));  // both positive
}

TEST(Rope, WithinTwoUlpOfTheGoldenData) {
  // Libraries evaluate the power in float and differ by up to 2 ulp (spec/attention.md 3).
  const nlohmann::json rope = nlohmann::json::parse(
      read_file(std::string(DSV4_SOURCE_DIR) + "/tests/golden/data/manifest.json"))["rope"];
  const std::pair<const char*, const RopeParameters*> kLists[] = {
      {"main_inv_freq", &kMain}, {"compress_inv_freq", &kCompress}};
  for (const auto& [name, parameters] : kLists) {
    const std::vector<float> ours = rope_frequencies(*parameters, 64);
    ASSERT_EQ(rope[name].size(), ours.size());
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_LE(ulps(ours[i], rope[name][i].get<float>()), 2) << name << " pair " << i;
    }
  }
}

TEST(Rope, ExtremeParametersStayFinite) {
  for (int64_t original : {1, 100, 2147483647}) {
    for (double theta : {1.0001, 1e12}) {
      for (double beta : {1e-6, 1.0, 1e6}) {
        const RopeParameters parameters{.theta = theta,
                                        .yarn = true,
                                        .factor = 1e6,
                                        .beta_fast = beta,
                                        .beta_slow = beta,
                                        .original_max_position = original};
        for (float frequency : rope_frequencies(parameters, 64)) {
          EXPECT_TRUE(std::isfinite(frequency) && frequency >= 0 && frequency <= 1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace dsv4::testing
