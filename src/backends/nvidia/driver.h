// NVIDIA GPUs of this machine, asked of the driver: libcuda is loaded when first needed, so that
// the library needs no CUDA toolkit and runs without a driver.
#pragma once
#include "dsv4/backend.h"

namespace dsv4::nvidia {

/// Devices in the driver's order (CUDA_VISIBLE_DEVICES counts), or why there are none. Starts the
/// driver.
DeviceSearch find_devices();

}  // namespace dsv4::nvidia
