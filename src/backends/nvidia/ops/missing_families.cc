// Temporary: empty families until their kernels land.
#include "backends/nvidia/ops/families.h"
namespace dsv4::nvidia {
#define DSV4_MISSING(family)                                                            \
  __attribute__((weak)) std::span<const Candidate> family##_candidates() { return {}; } \
  __attribute__((weak)) int64_t family##_scratch_bytes(const ScratchLimits&) { return 0; }
DSV4_MISSING(rowwise)
DSV4_MISSING(attend)
DSV4_MISSING(index_logits)
DSV4_MISSING(top_k)
}  // namespace dsv4::nvidia
