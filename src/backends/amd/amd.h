// What the registry needs of the AMD backend, whether its GPU kernels are built in or not.
#pragma once
#include <memory>
#include <vector>

#include "dsv4/backend.h"
#include "dsv4/device.h"

namespace dsv4::amd {

/// ROCM_FLASHMLA_SPARSE_DSV4. It makes layers in every build: `rocm:emulated` needs no hardware.
std::vector<BackendEntry> backend_entries();

/// GPU `index` of the HIP runtime. @throws Error kUnsupported: not built in, or there is no such
/// device.
std::unique_ptr<Device> open_device(int index);

}  // namespace dsv4::amd
