// What a GPU can do at best, measured on it: the yardstick of `dsv4 bench`.
#pragma once
#include "dsv4/device.h"

namespace dsv4::nvidia {

/// Of the current device, on `stream`. Takes about a tenth of a second and 1 GiB for that time.
DeviceLimits measure_limits(Device& device);

}  // namespace dsv4::nvidia
