// AMD GPUs of this machine: the HIP runtime must be loadable, the kernel's topology lists what is
// there.
#pragma once
#include <string>
#include <vector>

#include "dsv4/backend.h"

namespace dsv4::amd {

/// GPUs of a KFD topology folder (nodes/N/properties), in node order. CPU nodes have no gfx version
/// and are left out; an unreadable folder has no GPUs.
std::vector<DeviceInfo> read_topology(const std::string& folder);

/// Devices in node order, or why there are none. Variables that hide devices from the HIP runtime
/// are not considered.
DeviceSearch find_devices();

}  // namespace dsv4::amd
