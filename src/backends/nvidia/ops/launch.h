// Launch attributes that CUDA wants asked for.
#pragma once
#include "backends/nvidia/ops/gpu_check.h"

namespace dsv4::nvidia {

/// Kernels with more than 48 KiB of dynamic shared memory must say so, once per device; a host call
/// of a microsecond that may stand in a captured stream.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  constexpr int kFree = 48 << 10;
  if (bytes <= kFree) return;
  DSV4_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace dsv4::nvidia
