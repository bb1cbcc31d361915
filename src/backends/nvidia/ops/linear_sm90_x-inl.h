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

/// This lane's four of the 128 columns from `col` of kRows rows from `row0`; zero from `rows` and
/// `cols` on. All loads are under way together.
template <int kRows>
__device__ __forceinline__ void load_columns(const Sm90PrepareParams& params, int64_t row0, int col,
                                             float (&values)[kRows][kQuantiseCols]) {
  const int lane_col = col + static_cast<int>(threadIdx.x) % 32 * kQuantiseCols;
  const uint16_t* from = params.x + row0 * params.x_stride + lane_col;
  const bool whole = lane_col + kQuantiseCols <= params.cols &&
                     (reinterpret_cast<uintptr_t>(from) | params.x_stride * 2) % 8 == 0;
  uint2 words[kRows];
  if (whole) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      words[r] = row0 + r < params.rows
                     ? *reinterpret_cast<const uint2*>(from + r * params.x_stride)
                     : uint2{0, 0};
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t each[kQuantiseCols];
#pragma unroll
      for (int i = 0; i < kQuantiseCols; ++i) {
        each[i] = row0 + r < params.rows && lane_col + i < params.cols
                      ? from[r * params.x_stride + i]
                      : 0u;
      }
      words[r] = {each[0] | each[1] << 16, each[2] | each[3] << 16};
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    values[r][0] = __uint_as_float(words[r].x << 16);
    values[r][1] = __uint_as_float(words[r].x & 0xffff0000u);
    values[r][2] = __uint_as_float(words[r].y << 16);
    values[r][3] = __uint_as_float(words[r].y & 0xffff0000u);
  }
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
