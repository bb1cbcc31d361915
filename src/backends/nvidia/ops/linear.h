// Dense products of the NVIDIA backend: the canonical order of every sum, and what the kernels of
// this family share.
//
// One order for every output, whatever the number of rows of x, the tile and the number of problems
// (tests compare bits):
//
//   K is cut into linear_num_segments(K) segments of linear_segment_cols(K) columns, which depend
//   on K only. Inside a segment, from zero, m16n8k16 products of 16 columns are accumulated in f32.
//   Four lanes share a chunk of 4 * kLaneCols columns (32 of bf16, 64 of FP8, 128 of FP4 weights);
//   lane t owns 16 bytes of it, columns [t * kLaneCols, (t + 1) * kLaneCols); product i of a chunk
//   takes columns 4i .. 4i + 3 of each lane. Segments are added in ascending order, then one
//   rounding.
//
// Outputs are computed transposed: rows of W are the 16 rows of the instruction, tokens its 8
// columns. Columns of K beyond the end are zero. f32 x with bf16 weights: x is split into three
// bf16 numbers, each is multiplied so, and the three sums are added, the largest part first. Other
// f32 operands have an order of their own (linear_reference.cu).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/ops.h"

namespace dsv4::nvidia {

constexpr int kLinearChunkCols =
    128;  ///< segments are multiples of it: a whole chunk of any format
constexpr int kLinearSegmentCols = 512;  ///< a segment is at least this long, ...
constexpr int kLinearMaxSegments = 8;    ///< ... as long as there are no more than this many

__host__ __device__ constexpr int linear_num_segments(int64_t cols) {
  const int64_t segments = (cols + kLinearSegmentCols - 1) / kLinearSegmentCols;
  return segments < kLinearMaxSegments ? static_cast<int>(segments) : kLinearMaxSegments;
}
__host__ __device__ constexpr int linear_segment_cols(int64_t cols) {
  const int64_t share = (cols + linear_num_segments(cols) - 1) / linear_num_segments(cols);
  return static_cast<int>((share + kLinearChunkCols - 1) / kLinearChunkCols * kLinearChunkCols);
}

/// A weight as kernels read it.
struct LinearWeight {
  DType dtype;
  int32_t rows, cols;
  int32_t block_rows;                   ///< of a scale; 1 for kF4E2M1
  int32_t block_cols, block_cols_log2;  ///< of a scale: 128 and more for kF8E4M3, 32 for kF4E2M1
  int64_t row_bytes;
  int64_t scale_stride;
  const uint8_t* data;
  const uint8_t* scale;
};

/// One product. `first_tile` is the first block that works on it.
struct LinearItem {
  LinearWeight w;
  const void* x;  ///< [tokens, cols]: bf16, or f32 in the reference kernel
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  int32_t tokens;
  int32_t first_tile;
  bool x_f32, out_f32;
  int64_t x_plane_stride = 0;  ///< of the split kernel: elements between the bf16 parts of x
};

/// The products of one launch, a kernel parameter.
constexpr int kMaxLinearItems = 32;
struct LinearBatch {
  int32_t count = 0;
  LinearItem items[kMaxLinearItems];
};

LinearWeight linear_weight(const Weight& weight);

/// Can the tensor-core kernels read it: whole 16-byte pieces, FP8 scale blocks of 2^n >= 128
/// columns? A property of the weight alone, so that every call takes the same way.
bool tensor_cores_take(const Weight& weight);

/// Few tokens: a block streams some rows of W, its warps share K.
void launch_linear_stream(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream);
constexpr int kMaxStreamTokens = 16;
/// Many tokens: a block computes 128 rows x 64 or 128 tokens.
void launch_linear_tile(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream);
/// The better of the two.
void launch_linear_fast(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream);
/// f32 x as the sum of three bf16 numbers, the planes of `x`, with bf16 weights.
void launch_linear_split(LinearBatch& batch, cudaStream_t stream);
/// Any operands, without tensor cores.
void launch_linear_reference(LinearBatch& batch, cudaStream_t stream);

/// out[r, :] = x[r, :], where `quantise`: through E4M3 per 128 columns (numerics.md 4). Rows of out
/// are `out_stride` long.
struct PrepareParams {
  const uint16_t* x;
  int64_t x_stride;
  uint16_t* out;
  int64_t out_stride;
  int32_t rows, cols;
  bool quantise;
};
void launch_linear_prepare(const PrepareParams& params, cudaStream_t stream);

/// x = high + middle + low, exactly but for what is below bf16's smallest number; rows as above.
struct SplitParams {
  const float* x;
  int64_t x_stride;
  uint16_t* out;
  int64_t out_stride, plane_stride;
  int32_t rows, cols;
};
void launch_linear_split_prepare(const SplitParams& params, cudaStream_t stream);

/// Which kernels a candidate uses: what one cannot take goes to the next.
enum class LinearKernels {
  kReference,
  kSm80,     ///< tensor cores for bf16 x
  kSm90,     ///< warpgroup tensor cores for bf16 x with FP8 or bf16 weights (linear_sm90.h),
             ///< where Products::kFp8 is asked for the FP8 ones
  kSm90Fp8,  ///< FP8 ones for all quantised x with FP8 weights (linear_sm90_fp8.h)
};
void run_linear(const LinearParams& params, const OpContext& context, LinearKernels kernels);

}  // namespace dsv4::nvidia
