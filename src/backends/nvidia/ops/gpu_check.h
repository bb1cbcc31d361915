// CUDA calls that throw, for host code of the NVIDIA backend.
#pragma once
#include <cuda_runtime_api.h>

#include "core/fail.h"
#include "dsv4/device.h"

namespace dsv4::nvidia {

[[noreturn]] inline void cuda_failed(cudaError_t code, const char* call, const char* file,
                                     int line) {
  int device = -1;
  cudaGetDevice(&device);
  fail(code == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kDeviceError,
       "cuda:", device, ": ", call, " failed: ", cudaGetErrorName(code), " (",
       cudaGetErrorString(code), ") at ", file, ":", line);
}

inline cudaStream_t stream_of(Stream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

}  // namespace dsv4::nvidia

/// Runs a CUDA runtime call; @throws Error kDeviceError (kOutOfMemory) with the call and the
/// driver's words.
#define DSV4_CUDA_CHECK(call)                                        \
  do {                                                               \
    if (const cudaError_t code_ = (call); code_ != cudaSuccess)      \
      ::dsv4::nvidia::cuda_failed(code_, #call, __FILE__, __LINE__); \
  } while (false)

/// After a kernel launch: a refused configuration is an error here, not at the next call.
#define DSV4_CUDA_CHECK_LAUNCH() DSV4_CUDA_CHECK(cudaGetLastError())
