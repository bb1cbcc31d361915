// Row-wise operations on NVIDIA: the kernels of backends/gpu, which AMD shares, and a compressor of
// its own (docs/kernels/rowwise_gpu.md). Compiled without contraction, as gpu/platform.h asks.
#include "backends/gpu/rowwise_ops.h"
#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/rowwise_compress.h"

namespace dsv4::nvidia {

std::span<const Candidate> rowwise_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"rowwise", "shared", needs_sm80,
       [](Ops& ops) {
         gpu::install_rowwise<CudaLaunch>(ops);
         ops.compress = compress;
       }},
  };
  return kCandidates;
}

int64_t rowwise_scratch_bytes(const ScratchLimits& limits) {
  return gpu::rowwise_scratch_bytes(limits);
}

}  // namespace dsv4::nvidia
