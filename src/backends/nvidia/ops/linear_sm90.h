// Products of many rows of bf16 x with FP8 or bf16 weights on the warpgroup tensor cores of sm_90.
//
// Their order is that of linear.h, and so are the bits: wgmma adds 16 products to a sum as
// mma.sync.m16n8k16 does on this device (tests compare calls that take one and the other).
//
// FP8 weights become bf16 in registers, scale included, which is exact (linear_weight-inl.h).
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "backends/nvidia/ops/linear.h"

namespace dsv4::nvidia {

constexpr int kSm90PanelCols = 64;  ///< 128 bytes of x: what one swizzled row of an operand holds

__host__ __device__ constexpr int sm90_num_panels(int64_t cols) {
  return static_cast<int>((cols + kSm90PanelCols - 1) / kSm90PanelCols);
}
/// Of a segment.
__host__ __device__ constexpr int sm90_segment_panels(int64_t cols) {
  return linear_segment_cols(cols) / kSm90PanelCols;
}

/// One product.
struct Sm90Item {
  CUtensorMap w_map, x_map;  ///< filled in by the launcher
  LinearWeight w;
  /// Prepared x: panels of [x_rows][64] bf16, as many as columns rounded up to 128 need.
  const uint16_t* x;
  int64_t x_rows;
  void* out;
  int64_t out_stride;
  int32_t tokens;
  int32_t first_tile;
  bool out_f32;
};
constexpr int kMaxSm90Items = 16;
/// Products of one launch, whose weights have one format.
struct Sm90Batch {
  int32_t count = 0;
  int32_t most_blocks = 0;  ///< that walk over tiles
  Sm90Item items[kMaxSm90Items];
};

/// FP8 with scale blocks of 128 columns x a multiple of 128 rows, or bf16; 16-byte aligned rows.
bool sm90_takes(const Weight& weight);

/// Tokens of a tile where a call has `tokens`; x is prepared for whole tiles.
int sm90_tile_tokens(int64_t tokens);
constexpr int kSm90MaxTileTokens = 128;

void launch_linear_sm90(DType w, Sm90Batch& batch, cudaStream_t stream);

/// x [rows, cols] bf16, through E4M3 and back per 128 columns where `quantise` (numerics.md 4), as
/// panels for weights of type `w` (linear_sm90_x-inl.h). Rows up to `out_rows` and columns up to a
/// multiple of 128 are zero.
struct Sm90PrepareParams {
  const uint16_t* x;
  int64_t x_stride;
  uint16_t* out;
  int32_t rows, cols, out_rows;
  DType w;
  bool quantise;
};
void launch_linear_sm90_prepare(const Sm90PrepareParams& params, cudaStream_t stream);

}  // namespace dsv4::nvidia
