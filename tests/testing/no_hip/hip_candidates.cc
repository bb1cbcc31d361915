// A build without HIP has no kernels for AMD GPUs.
#include "core/fail.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

void append_hip_candidates(const std::string&, std::vector<OpCandidate>&) {}

OpenedCandidate open_hip_candidate(const std::string& forced) {
  fail(ErrorCode::kUnsupported, "candidate ", forced, ": HIP is not built in");
}

}  // namespace dsv4::testing
