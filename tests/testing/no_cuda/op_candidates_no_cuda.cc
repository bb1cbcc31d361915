// A build without CUDA has no candidates of it.
#include "core/fail.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

void append_cuda_candidates(const std::string&, std::vector<OpCandidate>&) {}

OpenedCandidate open_cuda_candidate(const std::string& forced) {
  fail(ErrorCode::kUnsupported, "candidate ", forced, ": CUDA is not built in");
}

}  // namespace dsv4::testing
