// Products of FP8 weights with quantised input on the FP8 tensor cores of sm_90.
//
// Their canonical order: K in segments of whole blocks of 128 columns, `fp8_num_segments(K)` of
// them. A block is four wgmma products of 32 columns from zero; the segment's sum takes it by
// fma(block, scale of x * scale of W, sum) in ascending order; segments are added in ascending
// order. Only K counts: not tokens, tiles or the number of blocks that share a segment.
#pragma once
#include <cuda_runtime_api.h>

#include "backends/nvidia/ops/linear.h"

namespace dsv4::nvidia {

constexpr int kFp8Block = 128;        ///< columns of a scale of x and of W
constexpr int kFp8SegmentBlocks = 8;  ///< a segment has at least so many blocks, ...
constexpr int kFp8MaxSegments = 8;    ///< ... as long as there are no more than this

__host__ __device__ constexpr int fp8_num_segments(int64_t cols) {
  const int64_t columns = int64_t{kFp8Block} * kFp8SegmentBlocks;
  const int64_t segments = (cols + columns - 1) / columns;
  return segments < kFp8MaxSegments ? static_cast<int>(segments) : kFp8MaxSegments;
}
__host__ __device__ constexpr int fp8_segment_blocks(int64_t cols) {
  const int64_t blocks = (cols + kFp8Block - 1) / kFp8Block;
  return static_cast<int>((blocks + fp8_num_segments(cols) - 1) / fp8_num_segments(cols));
}

/// One product: E4M3 codes of x with a power-of-two scale per row and 128 columns.
struct Fp8Item {
  LinearWeight w;
  const uint8_t* x;  ///< [tokens, cols rounded up to 128], zero beyond cols;
                     ///< 16-byte aligned rows
  int64_t x_stride;
  const float* x_scales;  ///< scale of (token, block) at x_scales[block *
                          ///< x_scale_stride + token]
  int64_t x_scale_stride;
  void* out;
  int64_t out_stride;
  int32_t tokens;
  int32_t first_tile;
  bool out_f32;
};
struct Fp8Batch {
  int32_t count = 0;
  Fp8Item items[kMaxLinearItems];
};

/// Scale blocks of 128 columns x a multiple of 128 rows, 16-byte aligned rows.
bool fp8_tensor_cores_take(const Weight& weight);

void launch_linear_fp8(Fp8Batch& batch, cudaStream_t stream);

/// x [rows, cols] bf16 -> codes and scales (numerics.md 3, 4). `floor`: of the largest magnitude of
/// a group. A group with an infinity or NaN gets NaN codes.
struct Fp8PrepareParams {
  const uint16_t* x;
  int64_t x_stride;
  uint8_t* codes;
  int64_t codes_stride;
  float* scales;
  int64_t scale_stride;
  int32_t rows, cols;
  float floor;
};
void launch_linear_fp8_prepare(const Fp8PrepareParams& params, cudaStream_t stream);

}  // namespace dsv4::nvidia
