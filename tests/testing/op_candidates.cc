#include "tests/testing/op_candidates.h"

#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"

namespace dsv4::testing {

std::vector<OpCandidate> op_candidates(const std::string& family) {
  std::vector<OpCandidate> out;
  for (const cpu::Candidate& candidate : cpu::candidates()) {
    if (!family.empty() && candidate.family != family) continue;
    out.push_back({Platform::kCpu, std::string(candidate.family), std::string(candidate.name),
                   candidate.why_not(), true});
  }
  // A family with one kernel on the CPU has no list there.
  if (out.empty()) out.push_back({Platform::kCpu, "", "only", "", true});
  append_cuda_candidates(family, out);
  return out;
}

OpenedCandidate open_candidate(const OpCandidate& candidate, int num_threads) {
  const std::string forced =
      candidate.family.empty() ? "" : candidate.family + ":" + candidate.name;
  if (candidate.platform == Platform::kCuda) return open_cuda_candidate(forced);
  return {cpu::open_cpu_device(num_threads), cpu::make_ops(forced)};
}

}  // namespace dsv4::testing
