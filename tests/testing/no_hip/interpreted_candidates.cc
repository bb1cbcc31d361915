// A build without HIP has no compiled kernels to interpret.
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

void append_interpreted_candidates(const std::string&, std::vector<OpCandidate>&) {}

OpenedCandidate open_interpreted_candidate(const OpCandidate&, int) {
  return {};
}

}  // namespace dsv4::testing
