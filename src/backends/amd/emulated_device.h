// "rocm:emulated": the kernels of the AMD backend on the executor, in host memory. For tests and
// for looking at what the backend computes without its hardware; thousands of times slower than
// that. A device of every build.
#pragma once
#include <memory>
#include <span>
#include <string_view>

#include "backends/amd/candidates.h"
#include "backends/gpu/executor.h"
#include "dsv4/device.h"

namespace dsv4::amd {

/// The candidates over the executor with lanes in that order.
std::span<const Candidate> emulated_candidates(gpu::LaneOrder order);

/// The best of them, or the forced ones (`DSV4_KERNEL`). @throws Error as make_ops.
Ops make_emulated_ops(gpu::LaneOrder order, std::string_view forced = "");

/// @param num_threads  threads that blocks spread over; 0: all cores. @throws Error
/// kInvalidArgument when negative or more than 1024.
std::unique_ptr<Device> open_emulated_device(int num_threads);

}  // namespace dsv4::amd
