#include "tests/testing/op_candidates.h"

#include <set>

#include "backends/amd/emulated_device.h"
#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"

namespace dsv4::testing {
namespace {

// AMD kernels on the executor, in both lane orders: a missing barrier shows in one of them.
constexpr const char* kForward = "emulated";
constexpr const char* kReverse = "emulated_reverse";

void append_emulated_candidates(const std::string& family, std::vector<OpCandidate>& out) {
  static const std::set<std::string> kFamilies{"rowwise", "model_rows", "attend"};
  if (!kFamilies.contains(family)) return;
  for (const char* name : {kForward, kReverse})
    out.push_back({Platform::kRocm, family, name, "", family != "attend"});
}

}  // namespace

std::vector<OpCandidate> op_candidates(const std::string& family) {
  std::vector<OpCandidate> out;
  for (const cpu::Candidate& candidate : cpu::candidates()) {
    if (!family.empty() && candidate.family != family) continue;
    out.push_back({Platform::kCpu, std::string(candidate.family), std::string(candidate.name),
                   candidate.why_not(), true});
  }
  // A family with one kernel on the CPU has no list there.
  if (out.empty()) out.push_back({Platform::kCpu, "", "only", "", true});
  append_emulated_candidates(family, out);
  append_cuda_candidates(family, out);
  return out;
}

OpenedCandidate open_candidate(const OpCandidate& candidate, int num_threads) {
  const std::string forced =
      candidate.family.empty() ? "" : candidate.family + ":" + candidate.name;
  if (candidate.platform == Platform::kCuda) return open_cuda_candidate(forced);
  if (candidate.platform == Platform::kRocm) {
    return {amd::open_emulated_device(num_threads),
            amd::make_emulated_ops(candidate.name == kReverse ? gpu::LaneOrder::kReverse
                                                              : gpu::LaneOrder::kForward)};
  }
  return {cpu::open_cpu_device(num_threads), cpu::make_ops(forced)};
}

}  // namespace dsv4::testing
