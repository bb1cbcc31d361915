// The NVIDIA backends of a build with CUDA.
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/descriptors.h"
#include "backends/nvidia/flashinfer_attention.h"
#include "backends/nvidia/flashmla_attention.h"
#include "backends/nvidia/nvidia.h"

namespace dsv4::nvidia {

std::vector<BackendEntry> backend_entries() {
  return {{&flashmla_descriptor(), why_not_here, FlashMlaAttention::create},
          {&flashinfer_descriptor(), why_not_here, FlashInferAttention::create}};
}

std::unique_ptr<Device> open_device(int index) {
  return open_cuda_device(index);
}

}  // namespace dsv4::nvidia
