// The NVIDIA backends of a build without CUDA: data only.
#include "backends/nvidia/descriptors.h"
#include "backends/nvidia/nvidia.h"
#include "core/fail.h"

namespace dsv4::nvidia {

std::vector<BackendEntry> backend_entries() {
  return {{&flashmla_descriptor(), why_not_here, nullptr},
          {&flashinfer_descriptor(), why_not_here, nullptr}};
}

std::unique_ptr<Device> open_device(int index) {
  fail(ErrorCode::kUnsupported, "cuda:", index, ": ", flashmla_descriptor().not_built);
}

}  // namespace dsv4::nvidia
