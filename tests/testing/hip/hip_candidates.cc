// Candidates of the AMD backend on a GPU of this machine.
#include "backends/amd/hip_device.h"
#include "core/fail.h"
#include "dsv4/backend.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

void append_hip_candidates(const std::string& family, std::vector<OpCandidate>& out) {
  const DeviceSearch search = find_devices(Platform::kRocm);
  for (const amd::Candidate& candidate : amd::hip_candidates()) {
    if (candidate.family != family) continue;
    out.push_back({Platform::kRocm, family, concat(kOnGpu, candidate.name),
                   search.devices.empty() ? search.why_none
                                          : candidate.why_not(search.devices.front().capability),
                   false});
  }
}

OpenedCandidate open_hip_candidate(const std::string& forced) {
  const DeviceSearch search = find_devices(Platform::kRocm);
  return {amd::open_hip_device(0),
          amd::make_ops(amd::hip_candidates(), search.devices.at(0).capability, forced)};
}

}  // namespace dsv4::testing
