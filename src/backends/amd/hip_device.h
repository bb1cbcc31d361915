// An AMD GPU as a device: its memory, a stream, and the kernels that run on it.
#pragma once
#include <memory>
#include <span>

#include "backends/amd/candidates.h"
#include "dsv4/device.h"

namespace dsv4::amd {

/// The candidates over launches on a GPU.
std::span<const Candidate> hip_candidates();

/// @throws Error kUnsupported: there is no such device; kDeviceError: the runtime refuses.
/// Kernels are chosen here, once: the best usable candidate of every family, or those named by
/// DSV4_KERNEL (family:name[,family:name]).
std::unique_ptr<Device> open_hip_device(int index);

}  // namespace dsv4::amd
