#include "attention/descriptor.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace dsv4 {
namespace {

TEST(ArchitectureName, OfEveryPlatform) {
  EXPECT_EQ(architecture_name(Platform::kCuda, {9, 0}), "sm_90");
  EXPECT_EQ(architecture_name(Platform::kCuda, {10, 3}), "sm_103");
  EXPECT_EQ(architecture_name(Platform::kCuda, {12, 0}), "sm_120");
  EXPECT_EQ(architecture_name(Platform::kRocm, {9, 4, 2}), "gfx942");
  EXPECT_EQ(architecture_name(Platform::kRocm, {9, 5, 0}), "gfx950");
  EXPECT_EQ(architecture_name(Platform::kRocm, {9, 0, 10}), "gfx90a");
  EXPECT_EQ(architecture_name(Platform::kRocm, {11, 0, 0}), "gfx1100");
  EXPECT_EQ(architecture_name(Platform::kCpu, {}), "cpu");
}

TEST(RunsOn, NvidiaCompatibility) {
  const struct {
    const char* built;
    Capability device;
    bool expected;
  } cases[] = {
      // Machine code: same major, that minor or a later one.
      {"sm_80", {8, 0}, true},
      {"sm_80", {8, 9}, true},
      {"sm_86", {8, 0}, false},
      {"sm_80", {9, 0}, false},
      {"sm_90", {8, 9}, false},
      // Architecture-specific code: that device only.
      {"sm_90a", {9, 0}, true},
      {"sm_90a", {10, 0}, false},
      {"sm_100a", {10, 0}, true},
      {"sm_100a", {10, 3}, false},
      // Family-specific code.
      {"sm_100f", {10, 0}, true},
      {"sm_100f", {10, 3}, true},
      {"sm_103f", {10, 0}, false},
      {"sm_100f", {12, 0}, false},
      // PTX: everything later.
      {"compute_80", {8, 0}, true},
      {"compute_80", {9, 0}, true},
      {"compute_80", {12, 0}, true},
      {"compute_90", {8, 9}, false},
      {"compute_86", {8, 0}, false},
      {"compute_90a", {9, 0}, true},
      {"compute_90a", {10, 0}, false},
      // Other texts.
      {"sm_", {9, 0}, false},
      {"sm_9", {9, 0}, false},
      {"sm_90x", {9, 0}, false},
      {"90", {9, 0}, false},
      {"gfx942", {9, 4, 2}, false},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(runs_on(c.built, Platform::kCuda, c.device), c.expected)
        << c.built << " on " << architecture_name(Platform::kCuda, c.device);
  }
}

TEST(RunsOn, AmdAndCpuCompareNames) {
  EXPECT_TRUE(runs_on("gfx942", Platform::kRocm, {9, 4, 2}));
  EXPECT_FALSE(runs_on("gfx942", Platform::kRocm, {9, 5, 0}));
  EXPECT_FALSE(runs_on("sm_94", Platform::kRocm, {9, 4, 2}));
  EXPECT_TRUE(runs_on("cpu", Platform::kCpu, {}));
}

TEST(Reason, SaysBothValues) {
  const Reason reason{"head_dim", "512", "128"};
  EXPECT_EQ(reason.str(), "head_dim: 128, required 512");
  const Reason two[] = {reason, {"o_groups", "divisible by 2", "3"}};
  EXPECT_EQ(join_reasons(two), "head_dim: 128, required 512; o_groups: 3, required divisible by 2");
  EXPECT_EQ(join_reasons({}), "");
}

TEST(FormatNames, AreJoined) {
  EXPECT_EQ(format_names({KvFormat::kFp8DsMla, KvFormat::kBf16}), "fp8_ds_mla, bf16");
}

AttentionDescriptor flashmla_like() {
  AttentionDescriptor out;
  out.name = "FLASHMLA_SPARSE_DSV4";
  out.platform = Platform::kCuda;
  out.kv_formats = {KvFormat::kFp8DsMla};
  out.max_heads = 128;
  out.padded_num_q_heads = [](int n) { return n; };
  out.architectures = {"sm_80", "sm_90a"};
  return out;
}

bool any_contains(const std::vector<std::string>& lines, std::string_view text) {
  return std::any_of(lines.begin(), lines.end(),
                     [&](const std::string& line) { return line.find(text) != line.npos; });
}

TEST(UpstreamDifferences, NamePaddingArchitecturesAndDtype) {
  const std::vector<std::string> lines = upstream_differences(flashmla_like());
  EXPECT_TRUE(any_contains(lines, "1 to 63 heads: not padded here, vLLM pads to 64"));
  EXPECT_TRUE(any_contains(lines, "65 to 127 heads: not padded here, vLLM pads to 128"));
  EXPECT_TRUE(any_contains(lines, "sm_80, sm_90a here, vLLM's kernels need sm_9x, sm_10x"));
  EXPECT_TRUE(any_contains(lines, "kv cache dtype auto: fp8_ds_mla here"));
  EXPECT_FALSE(any_contains(lines, "more than 128"));
}

TEST(UpstreamDifferences, NothingToSayAboutPaddingThatAgrees) {
  AttentionDescriptor same = flashmla_like();
  same.padded_num_q_heads = [](int n) { return n <= 64 ? 64 : 128; };
  EXPECT_FALSE(any_contains(upstream_differences(same), "padded here"));
  EXPECT_FALSE(any_contains(upstream_differences(same), "heads:"));
  same.max_heads = 0;
  EXPECT_TRUE(any_contains(upstream_differences(same),
                           "more than 128 heads on a rank: taken here, vLLM refuses them"));
}

TEST(UpstreamDifferences, UnknownUpstream) {
  AttentionDescriptor toy = flashmla_like();
  toy.name = "TOY";
  EXPECT_EQ(upstream_differences(toy),
            std::vector<std::string>{"vLLM has no backend of this name"});
}

}  // namespace
}  // namespace dsv4
