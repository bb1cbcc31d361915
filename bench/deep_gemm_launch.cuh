// Tensor maps and launches for DeepGEMM's kernels.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace dsv4::deep_gemm {

constexpr int kMultiprocessors = 132;

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "DeepGEMM: %s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

/// Dimensions from the innermost; `strides` in bytes, of all but the innermost.
inline CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int swizzle_bytes,
                              std::initializer_list<uint64_t> sizes,
                              std::initializer_list<uint64_t> strides,
                              std::initializer_list<uint32_t> box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const CUtensorMapSwizzle swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
  const uint32_t ones[3] = {1, 1, 1};
  CUtensorMap map;
  if (encode(&map, type, static_cast<uint32_t>(sizes.size()), const_cast<void*>(data),
             sizes.begin(), strides.begin(), box.begin(), ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    std::fprintf(stderr, "DeepGEMM: a tensor map was refused\n");
    std::exit(1);
  }
  return map;
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, int blocks, int threads, int smem_bytes, int cluster,
            cudaStream_t stream, Args... args) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        "shared memory");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

}  // namespace dsv4::deep_gemm
