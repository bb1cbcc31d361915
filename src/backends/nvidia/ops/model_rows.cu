// The model around attention on NVIDIA: the kernels of backends/gpu, which AMD shares. Compiled
// without contraction, as gpu/platform.h asks.
#include "backends/gpu/model_rows_ops.h"
#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia {

std::span<const Candidate> model_rows_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"model_rows", "shared", needs_sm80, gpu::install_model_rows<CudaLaunch>},
  };
  return kCandidates;
}

int64_t model_rows_scratch_bytes(const ScratchLimits& limits) {
  return gpu::model_rows_scratch_bytes(limits);
}

}  // namespace dsv4::nvidia
