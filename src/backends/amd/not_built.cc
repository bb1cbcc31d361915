// The AMD backend of a build without HIP: layers for the emulated device only.
#include "backends/amd/amd.h"
#include "backends/amd/descriptors.h"
#include "core/fail.h"

namespace dsv4::amd {

std::unique_ptr<Device> open_device(int index) {
  fail(ErrorCode::kUnsupported, "rocm:", index, ": ", rocm_aiter_descriptor().not_built);
}

}  // namespace dsv4::amd
