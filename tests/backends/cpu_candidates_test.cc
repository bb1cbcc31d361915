// The CPU's candidates: their order by the maker of the CPU, forcing, what `dsv4 backends` shows.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "backends/cpu/cpu_device.h"
#include "backends/cpu/isa.h"

namespace dsv4::cpu {
namespace {

std::vector<std::string> names(const std::vector<Candidate>& list) {
  std::vector<std::string> out;
  for (const Candidate& candidate : list) out.emplace_back(candidate.name);
  return out;
}

std::vector<Candidate> written(const std::vector<const char*>& written_names) {
  std::vector<Candidate> list;
  for (const char* name : written_names) {
    list.push_back({"family", name, runs_anywhere, nullptr});
  }
  return list;
}

TEST(CpuCandidates, Bf16DotProductsComeFirstWhereTheyAreFast) {
  using Names = std::vector<std::string>;
  const auto two = written({"avx512bf16", "avx512", "avx2", "reference"});
  const auto three = written({"avx512bf16", "avx512vnni", "avx512", "avx2", "reference"});
  EXPECT_EQ(names(best_first(two, "AuthenticAMD")), names(two));
  EXPECT_EQ(names(best_first(three, "AuthenticAMD")), names(three));
  for (const char* maker : {"GenuineIntel", "", "CentaurHauls"}) {
    EXPECT_EQ(names(best_first(two, maker)), (Names{"avx512", "avx512bf16", "avx2", "reference"}))
        << maker;
    EXPECT_EQ(names(best_first(three, maker)),
              (Names{"avx512vnni", "avx512", "avx512bf16", "avx2", "reference"}))
        << maker;
  }
  EXPECT_TRUE(best_first({}, "GenuineIntel").empty());
}

#if defined(__x86_64__)
TEST(CpuCandidates, EveryInstructionSetHasItsKernels) {
  EXPECT_EQ(cpu_maker().size(), 12u);
  for (const char* family : {"linear", "attend", "index_logits"}) {
    for (const char* name : {"avx512bf16", "avx512", "avx2", "reference"}) {
      const auto found =
          std::find_if(candidates().begin(), candidates().end(),
                       [&](const Candidate& c) { return c.family == family && c.name == name; });
      EXPECT_NE(found, candidates().end()) << family << ":" << name;
    }
  }
  // What runs with BF16 instructions runs without them.
  EXPECT_TRUE(!why_not_avx512bf16().empty() || why_not_avx512vnni().empty());
  EXPECT_TRUE(!why_not_avx512vnni().empty() || why_not_avx512().empty());
}
#endif

TEST(CpuCandidates, TheDeviceShowsWhatItChose) {
  const std::string text = open_cpu_device(1)->description();
  for (const char* family : {"linear", "attend", "index_logits", "rowwise"}) {
    const auto usable =
        std::find_if(candidates().begin(), candidates().end(),
                     [&](const Candidate& c) { return c.family == family && c.why_not().empty(); });
    ASSERT_NE(usable, candidates().end());
    const std::string chosen = std::string(family) + ":" + std::string(usable->name);
    EXPECT_NE(text.find(chosen), std::string::npos) << text;
    EXPECT_NE(describe_cpu().find(chosen), std::string::npos) << describe_cpu();
  }
}

}  // namespace
}  // namespace dsv4::cpu
