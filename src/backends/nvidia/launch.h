// Starts kernels of backends/gpu on the stream of an operation.
#pragma once
#include "backends/gpu/platform.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "ops/ops.h"

namespace dsv4::nvidia {

class CudaLaunch {
 public:
  explicit CudaLaunch(const OpContext& context) : stream_(stream_of(context.stream)) {}
  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    DSV4_CUDA_CHECK(gpu::launch_cuda<Kernel>(blocks, params, stream_));
  }

 private:
  cudaStream_t stream_;
};

}  // namespace dsv4::nvidia
