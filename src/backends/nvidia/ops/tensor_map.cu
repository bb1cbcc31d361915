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

CUtensorMap map_of(const void* data, int dims, const cuuint64_t* sizes, const cuuint64_t* strides,
                   int box_rows, int box_matrices, bool swizzle) {
  static const EncodeTiled encode = encode_tiled();
  CUtensorMap map;
  const cuuint32_t box[3] = {128, static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_matrices)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, static_cast<cuuint32_t>(dims),
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DSV4_CHECK(result == CUDA_SUCCESS);
  return map;
}

}  // namespace

CUtensorMap byte_map(const void* data, int64_t row_stride, int64_t rows, int64_t row_bytes,
                     int box_rows, bool swizzle) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride)};
  return map_of(data, 2, sizes, strides, box_rows, 1, swizzle);
}

CUtensorMap byte_map_3d(const void* data, int64_t row_stride, int64_t matrix_stride,
                        int64_t matrices, int64_t rows, int64_t row_bytes, int box_rows,
                        int box_matrices) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride),
                                 static_cast<cuuint64_t>(matrix_stride)};
  return map_of(data, 3, sizes, strides, box_rows, box_matrices, true);
}

}  // namespace dsv4::nvidia
