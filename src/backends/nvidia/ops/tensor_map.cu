#include "backends/nvidia/ops/tensor_map.h"

#include <cuda_runtime_api.h>

#include "backends/nvidia/ops/gpu_check.h"
#include "core/fail.h"

namespace dsv4::nvidia {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: nothing links libcuda.
EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  DSV4_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                   cudaEnableDefault, &result));
  DSV4_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr);
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

CUtensorMap byte_map(const void* data, int64_t row_stride, int64_t rows, int64_t row_bytes,
                     int box_rows, bool swizzle) {
  static const EncodeTiled encode = encode_tiled();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DSV4_CHECK(result == CUDA_SUCCESS);
  return map;
}

}  // namespace dsv4::nvidia
