// The CPU as a device: host memory, a thread pool as its stream, and the kernels that this machine
// can run.
#pragma once
#include <memory>
#include <string>

#include "dsv4/device.h"

namespace dsv4::cpu {

/// @param num_threads  threads of the pool, the caller included; 0: all cores. @throws Error
/// kInvalidArgument when negative
///                     or more than 1024.
/// Kernels are chosen here, once: the best usable candidate of every family, or those named by
/// DSV4_KERNEL (family:name[,family:name]).
std::unique_ptr<Device> open_cpu_device(int num_threads);

/// For people, without opening it: the CPU's name and the kernels that open_cpu_device would
/// choose.
std::string describe_cpu();

}  // namespace dsv4::cpu
