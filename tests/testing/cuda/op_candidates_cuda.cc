// Candidates of the NVIDIA backend, in builds that have it.
#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "dsv4/backend.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

void append_cuda_candidates(const std::string& family, std::vector<OpCandidate>& out) {
  const DeviceSearch search = find_devices(Platform::kCuda);
  for (const nvidia::Candidate& candidate : nvidia::candidates()) {
    if (!family.empty() && candidate.family != family) continue;
    out.push_back({Platform::kCuda, std::string(candidate.family), std::string(candidate.name),
                   search.devices.empty() ? search.why_none
                                          : candidate.why_not(search.devices.front().capability),
                   candidate.family == "rowwise" || candidate.family == "model_rows"});
  }
}

OpenedCandidate open_cuda_candidate(const std::string& forced) {
  const DeviceSearch search = find_devices(Platform::kCuda);
  return {nvidia::open_cuda_device(0), nvidia::make_ops(search.devices.at(0).capability, forced)};
}

}  // namespace dsv4::testing
