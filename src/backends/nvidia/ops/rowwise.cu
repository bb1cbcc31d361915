// Row-wise operations on NVIDIA: the kernels of backends/gpu, which AMD shares
// (docs/kernels/rowwise_gpu.md). Compiled without contraction, as gpu/platform.h asks.
#include "backends/gpu/rowwise_ops.h"
#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia {

std::span<const Candidate> rowwise_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"rowwise", "shared", needs_sm80, gpu::install_rowwise<CudaLaunch>},
  };
  return kCandidates;
}

int64_t rowwise_scratch_bytes(const ScratchLimits& limits) {
  return gpu::rowwise_scratch_bytes(limits);
}

}  // namespace dsv4::nvidia
