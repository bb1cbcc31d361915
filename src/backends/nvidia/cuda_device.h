// An NVIDIA GPU as a device: its memory, a stream, and the kernels that run on it.
#pragma once
#include <memory>

#include "dsv4/device.h"

namespace dsv4::nvidia {

/// @throws Error kUnsupported: there is no such device; kDeviceError: the driver refuses.
/// Kernels are chosen here, once: the best usable candidate of every family, or those named by
/// DSV4_KERNEL (family:name[,family:name]).
std::unique_ptr<Device> open_cuda_device(int index);

}  // namespace dsv4::nvidia
