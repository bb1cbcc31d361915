// The HIP runtime as a table of functions: libamdhip64 is loaded when first needed, so that the
// library needs no ROCm, neither to build nor to run. Declarations are our own, of what has stayed
// the same from HIP 5 to 7 (HIP Runtime API reference, module, stream, memory and graph sections).
#pragma once
#include <cstddef>
#include <string>

#include "core/fail.h"

namespace dsv4::amd {

using HipError = int;
using HipStream = void*;
using HipModule = void*;
using HipFunction = void*;
using HipGraph = void*;
using HipGraphExec = void*;

inline constexpr HipError kHipSuccess = 0, kHipOutOfMemory = 2, kHipNotFound = 500;
inline constexpr int kHipHostToDevice = 1, kHipDeviceToHost = 2, kHipDeviceToDevice = 3;
inline constexpr unsigned kHipStreamNonBlocking = 1;
inline constexpr int kHipCaptureThreadLocal = 2;

struct HipRuntime {
  std::string file_name;  ///< that was found

  HipError (*init)(unsigned flags) = nullptr;
  const char* (*get_error_string)(HipError) = nullptr;
  HipError (*get_last_error)() = nullptr;
  HipError (*get_device_count)(int*) = nullptr;
  /// A structure that differs between versions: driver.cc says what is taken from it.
  HipError (*get_device_properties)(void*, int device) = nullptr;
  HipError (*get_device)(int*) = nullptr;
  HipError (*set_device)(int) = nullptr;
  HipError (*malloc)(void**, size_t) = nullptr;
  HipError (*free)(void*) = nullptr;
  HipError (*mem_get_info)(size_t* free_bytes, size_t* total_bytes) = nullptr;
  HipError (*memcpy_async)(void* to, const void* from, size_t bytes, int kind, HipStream) = nullptr;
  HipError (*stream_create_with_flags)(HipStream*, unsigned flags) = nullptr;
  HipError (*stream_destroy)(HipStream) = nullptr;
  HipError (*stream_synchronize)(HipStream) = nullptr;
  HipError (*module_load_data)(HipModule*, const void* image) = nullptr;
  HipError (*module_get_function)(HipFunction*, HipModule, const char* name) = nullptr;
  HipError (*module_launch_kernel)(HipFunction, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z,
                                   unsigned shared_bytes, HipStream, void** params,
                                   void** extra) = nullptr;
  HipError (*stream_begin_capture)(HipStream, int mode) = nullptr;
  HipError (*stream_end_capture)(HipStream, HipGraph*) = nullptr;
  HipError (*graph_instantiate)(HipGraphExec*, HipGraph, void** error_node, char* log,
                                size_t log_bytes) = nullptr;
  HipError (*graph_launch)(HipGraphExec, HipStream) = nullptr;
  HipError (*graph_destroy)(HipGraph) = nullptr;
  HipError (*graph_exec_destroy)(HipGraphExec) = nullptr;
};

/// The loaded runtime, or null and in `why_not` the reason: "no HIP runtime: ...". The library
/// stays loaded.
const HipRuntime* find_hip_runtime(std::string* why_not = nullptr);

/// The runtime where a device of it is in use. Its absence is our fault.
const HipRuntime& hip_runtime();

/// @throws Error kDeviceError unless `code` is success.
void check_hip(HipError code, const char* call);

}  // namespace dsv4::amd

/// DSV4_HIP(free(pointer)): calls through the table and throws unless it succeeds.
#define DSV4_HIP(call) ::dsv4::amd::check_hip(::dsv4::amd::hip_runtime().call, "hip: " #call)
