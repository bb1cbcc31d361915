// Every attend candidate of the CPU, forced in turn, through the suite of the canonical reduction.
#include <gtest/gtest.h>

#include <ostream>

#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"
#include "tests/testing/reduction_suite.h"

namespace dsv4::testing {
namespace {

const std::vector<AttendCase>& all_cases() {
  static const std::vector<AttendCase> cases =
      attend_cases({KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8}, /*exact=*/true);
  return cases;
}

struct Param {
  cpu::Candidate candidate;
  size_t case_idx;
};

void PrintTo(const Param& param, std::ostream* out) {
  *out << param.candidate.family << ":" << param.candidate.name << ", "
       << all_cases()[param.case_idx].name;
}

std::vector<Param> params() {
  std::vector<Param> out;
  for (const cpu::Candidate& candidate : cpu::attend_candidates()) {
    for (size_t i = 0; i < all_cases().size(); ++i) out.push_back({candidate, i});
  }
  return out;
}

class OracleAttend : public ::testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    if (const std::string reason = candidate().why_not(); !reason.empty()) {
      GTEST_SKIP() << candidate().name << ": " << reason;
    }
    candidate().install(ops_);
    device_ = cpu::open_cpu_device(2);
  }
  const cpu::Candidate& candidate() const { return GetParam().candidate; }
  const AttendCase& which() const { return all_cases()[GetParam().case_idx]; }
  Subject subject() { return {device_.get(), &ops_}; }

  Ops ops_;
  std::unique_ptr<Device> device_;
};

TEST_P(OracleAttend, AgreesWithTheOracle) {
  check_attend_oracle(subject(), which(), edge_tokens(which()), {});
}

TEST_P(OracleAttend, BitsDependOnOwnRowsOnly) {
  check_attend_invariance(subject(), which(), edge_tokens(which()));
}

TEST_P(OracleAttend, CornerCases) {
  check_attend_corner_cases(subject(), which());
}

TEST_P(OracleAttend, BitsDoNotDependOnThreads) {
  const std::vector<AttendToken> tokens = edge_tokens(which());
  const AttendResult two = run_attend(subject(), which(), tokens, {});
  for (int threads : {1, 5}) {
    device_ = cpu::open_cpu_device(threads);
    const AttendResult other = run_attend(subject(), which(), tokens, {});
    EXPECT_EQ(two.out, other.out) << threads << " threads";
    EXPECT_EQ(two.lse, other.lse) << threads << " threads";
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleAttend, ::testing::ValuesIn(params()),
                         [](const ::testing::TestParamInfo<Param>& info) {
                           return std::string(info.param.candidate.name) + "_" +
                                  all_cases()[info.param.case_idx].name;
                         });

}  // namespace
}  // namespace dsv4::testing
