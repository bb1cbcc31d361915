// x as the products of sm_90 read it: panels of 64 columns, rows of 128 bytes. Included by kernels
// only.
//
// Products take the columns that linear.h says: lane t holds 16 consecutive bytes of 64 of a row of
// W, columns 16 t .. of 64 of FP8, 8 t .. of 32 of bf16. They are four columns each of 4 or 2
// products of 16 columns, whose columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 they become. 16-byte unit u
// of row r of a panel lies at u ^ (r & 7).
#pragma once
#include "backends/nvidia/ops/linear_quantise-inl.h"
#include "backends/nvidia/ops/linear_sm90.h"

namespace dsv4::nvidia {

/// This lane's four of the 128 columns from `col`; zero from `cols` on.
__device__ __forceinline__ void load_columns(const uint16_t* row, int col, int cols,
                                             float (&values)[kQuantiseCols]) {
  const int lane_col = col + static_cast<int>(threadIdx.x) % 32 * kQuantiseCols;
  const uint16_t* from = row + lane_col;
  if (lane_col + kQuantiseCols <= cols && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    values[0] = __uint_as_float(words.x << 16), values[1] = __uint_as_float(words.x & 0xffff0000u);
    values[2] = __uint_as_float(words.y << 16), values[3] = __uint_as_float(words.y & 0xffff0000u);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i)
    values[i] = lane_col + i < cols ? bf16_to_float(from[i]) : 0.0f;
}

/// They become part of row `row` of two panels of `rows` rows each, for weights of FP8 or bf16.
template <bool kFp8>
__device__ __forceinline__ void put_columns(const float (&values)[kQuantiseCols], uint16_t* panels,
                                            int64_t rows, int64_t row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int panel = lane / 16, four = lane % 16;  // of the panel's 16 groups of four columns
  const int t = kFp8 ? four / 4 : four / 2 % 4;
  const int product = kFp8 ? four % 4 : four / 8 * 2 + four % 2;
  uint16_t* to = panels + (panel * rows + row) * kSm90PanelCols + 2 * t;
  const auto swizzle = static_cast<int>(row & 7);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t pair = float_to_bf16(values[2 * h]) |
                          static_cast<uint32_t>(float_to_bf16(values[2 * h + 1])) << 16;
    *reinterpret_cast<uint32_t*>(to + ((2 * product + h) ^ swizzle) * 8) = pair;
  }
}

}  // namespace dsv4::nvidia
