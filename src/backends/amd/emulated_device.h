// "rocm:emulated": the kernels of the AMD backend on the executor, in host memory. For tests and
// for looking at what the backend computes without its hardware; thousands of times slower than
// that.
#pragma once
#include <memory>

#include "backends/gpu/executor.h"
#include "dsv4/device.h"

namespace dsv4::amd {

/// Operations that run on the executor with lanes in that order. Those without an AMD kernel are
/// null.
Ops make_emulated_ops(gpu::LaneOrder order);

/// @param num_threads  threads that blocks spread over; 0: all cores.
std::unique_ptr<Device> open_emulated_device(int num_threads);

}  // namespace dsv4::amd
