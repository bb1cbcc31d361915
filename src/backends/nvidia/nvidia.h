// What the registry needs of the NVIDIA backends, whether they are built in or not.
#pragma once
#include <memory>
#include <vector>

#include "dsv4/backend.h"
#include "dsv4/device.h"

namespace dsv4::nvidia {

/// FlashMLA first. Without CUDA in the build they make no layers.
std::vector<BackendEntry> backend_entries();

/// @throws Error kUnsupported: not built in, or there is no such device.
std::unique_ptr<Device> open_device(int index);

}  // namespace dsv4::nvidia
