// Which part of which product a block works on. Included by kernels only.
#pragma once
#include <cuda_bf16.h>

#include "backends/nvidia/ops/linear.h"

namespace dsv4::nvidia {

/// Outputs [row0, ..) x [token0, token_end) of one product with bf16 x.
struct LinearTile {
  const LinearWeight* w;
  const uint16_t* x;
  int64_t x_stride;
  const int32_t* x_rows;  ///< token m reads row x_rows[m] of x; null: row m
  void* out;
  int64_t out_stride;
  bool out_f32;
  int row0;
  int token0, token_end;
  int64_t x_plane_stride = 0;

  __device__ __forceinline__ const uint16_t* x_row(int token) const {
    return x + (x_rows == nullptr ? token : x_rows[token]) * x_stride;
  }
  __device__ __forceinline__ void store(int token, int row, float value) const {
    const int64_t element = token * out_stride + row;
    if (out_f32) {
      static_cast<float*>(out)[element] = value;
    } else {
      static_cast<__nv_bfloat16*>(out)[element] = __float2bfloat16_rn(value);
    }
  }
  /// Byte of the scale block of (row, col 0); rows beyond the end take the last one.
  __device__ __forceinline__ const uint8_t* scale_row(int row) const {
    return w->scale + min(row, w->rows - 1) / w->block_rows * w->scale_stride;
  }
  /// Bytes of a row of W that hold columns, 16 of which are a lane's share of kLaneCols columns.
  template <int kLaneCols>
  __device__ __forceinline__ int w_bytes() const {
    return static_cast<int>(int64_t{w->cols} * 16 / kLaneCols);
  }
};

__device__ __forceinline__ const LinearItem& find_item(const LinearBatch& batch, int block) {
  int i = 0;
  while (i + 1 < batch.count && block >= batch.items[i + 1].first_tile) ++i;
  return batch.items[i];
}

/// Tile `block` of the item; tokens vary fastest, so that blocks that share rows of W run together.
__device__ __forceinline__ LinearTile make_tile(const LinearItem& item, int block, int tile_rows,
                                                int tile_tokens) {
  const int token_tiles = (item.tokens + tile_tokens - 1) / tile_tokens;
  const int tile = block - item.first_tile;
  const int token0 = tile % token_tiles * tile_tokens;
  return {.w = &item.w,
          .x = static_cast<const uint16_t*>(item.x),
          .x_stride = item.x_stride,
          .x_rows = nullptr,
          .out = item.out,
          .out_stride = item.out_stride,
          .out_f32 = item.out_f32,
          .row0 = tile / token_tiles * tile_rows,
          .token0 = token0,
          .token_end = min(item.tokens, token0 + tile_tokens),
          .x_plane_stride = item.x_plane_stride};
}

/// How many of the 16 bytes at `byte` lie before `end`.
__device__ __forceinline__ int valid_bytes(int end, int byte) {
  return max(0, min(16, end - byte));
}

}  // namespace dsv4::nvidia
