#include "tests/testing/op_candidates.h"

#include "backends/amd/emulated_device.h"
#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"

namespace dsv4::testing {
namespace {

// AMD kernels on the executor, in both lane orders: a missing barrier shows in one of them.
constexpr std::string_view kReverse = "_reverse";

void append_emulated_candidates(const std::string& family, std::vector<OpCandidate>& out) {
  for (const amd::Candidate& candidate : amd::emulated_candidates(gpu::LaneOrder::kForward)) {
    if (candidate.family != family) continue;
    const std::string name(candidate.name);
    const bool exact = family == "rowwise" || family == "model_rows";
    for (const std::string& in_order : {name, name + std::string(kReverse)})
      out.push_back({Platform::kRocm, family, in_order, "", exact});
  }
}

OpenedCandidate open_emulated_candidate(const OpCandidate& candidate, int num_threads) {
  std::string name = candidate.name;
  gpu::LaneOrder order = gpu::LaneOrder::kForward;
  if (name.ends_with(kReverse)) {
    name.resize(name.size() - kReverse.size());
    order = gpu::LaneOrder::kReverse;
  }
  return {amd::open_emulated_device(num_threads),
          amd::make_emulated_ops(order, candidate.family + ":" + name)};
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
  append_interpreted_candidates(family, out);
  append_cuda_candidates(family, out);
  append_hip_candidates(family, out);
  return out;
}

OpenedCandidate open_candidate(const OpCandidate& candidate, int num_threads) {
  const std::string forced =
      candidate.family.empty() ? "" : candidate.family + ":" + candidate.name;
  if (candidate.platform == Platform::kCuda) return open_cuda_candidate(forced);
  if (candidate.platform == Platform::kRocm) {
    if (candidate.name.starts_with(kOnGpu))
      return open_hip_candidate(candidate.family + ":" + candidate.name.substr(kOnGpu.size()));
    OpenedCandidate interpreted = open_interpreted_candidate(candidate, num_threads);
    return interpreted.device ? std::move(interpreted)
                              : open_emulated_candidate(candidate, num_threads);
  }
  return {cpu::open_cpu_device(num_threads), cpu::make_ops(forced)};
}

}  // namespace dsv4::testing
