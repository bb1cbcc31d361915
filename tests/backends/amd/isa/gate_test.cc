#include "backends/amd/isa/gate.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "dsv4/error.h"
#include "tests/backends/amd/isa/compiled.h"

namespace dsv4::amd::isa {
namespace {

class Gate : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_compiled().empty()) GTEST_SKIP() << why_not_compiled();
  }
  CodeObject code() const { return CodeObject::load(compiled("waves", GetParam())); }
  /// All violations in one text.
  std::string violations(const std::string& kernel, const GateRules& rules) const {
    std::string out;
    for (const std::string& line : gate_violations(code(), kernel, rules)) out += line + "\n";
    return out;
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, Gate, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

TEST_P(Gate, PassesAKernelWithinItsBudget) {
  GateRules rules;
  rules.expected = {{"v_mfma_f32_16x16x16_bf16", 1}, {"global_load_dwordx2", 2}};
  rules.forbidden = {"ds_", "scratch_"};
  rules.max_vgprs = 64;
  rules.workgroup_size = 64;
  EXPECT_EQ(violations("matmul", rules), "");
}

TEST_P(Gate, NamesEveryViolation) {
  GateRules rules;
  rules.expected = {{"v_mfma_", 100}};
  rules.forbidden = {"v_mfma_f32_16x16x16"};
  rules.max_vgprs = 3;
  rules.max_sgprs = 3;
  rules.workgroup_size = 256;
  const std::string text = violations("matmul", rules);
  EXPECT_NE(text.find("expected at least 100"), std::string::npos) << text;
  EXPECT_NE(text.find("expected none"), std::string::npos) << text;
  EXPECT_NE(text.find("vector registers, expected at most 3"), std::string::npos) << text;
  EXPECT_NE(text.find("scalar registers, expected at most 3"), std::string::npos) << text;
  EXPECT_NE(text.find("declares workgroups of 64 threads, expected 256"), std::string::npos)
      << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 5) << text;
}

TEST_P(Gate, ScratchAndLocalMemory) {
  GateRules rules;
  rules.workgroup_size = 64;
  EXPECT_NE(violations("uses_scratch", rules).find("bytes of scratch a lane, expected none"),
            std::string::npos)
      << violations("uses_scratch", rules);
  rules.workgroup_size = 256;
  EXPECT_EQ(violations("block_sum", rules), "");
  rules.max_lds_bytes = 1000;
  EXPECT_NE(violations("block_sum", rules).find("1024 bytes of LDS, expected at most 1000"),
            std::string::npos);
  rules.max_lds_bytes = 0;
  rules.dynamic_lds_bytes = 160 * 1024;
  EXPECT_NE(violations("block_sum", rules).find("164864 bytes of LDS"), std::string::npos);
  EXPECT_THROW(gate_violations(code(), "no_such", rules), Error);
}

TEST_P(Gate, DescribesResources) {
  const std::string text = describe_resources(code().kernel("block_sum"));
  EXPECT_NE(text.find("block_sum"), std::string::npos);
  EXPECT_NE(text.find("1024 B LDS"), std::string::npos) << text;
  EXPECT_NE(text.find("workgroup 256"), std::string::npos) << text;
}

}  // namespace
}  // namespace dsv4::amd::isa
