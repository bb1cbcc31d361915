// Queries as wq_b leaves them, normed and rotated in shared memory by the warps that multiply them:
// what qnorm_rope_insert would make of them, the same bits, without a launch and two trips to
// memory.
#pragma once
#include "backends/gpu/math.h"
#include "backends/gpu/row.h"
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/ops/attend_sm90.h"

namespace dsv4::nvidia::sm90_attend {

/// Of a token's rotation, of the pair of dims that is this lane's; a warp calls.
__device__ __forceinline__ gpu::CosSin find_angle(const TokenRotation& rotation, int token) {
  return gpu::rope_angle(rotation.positions[token], rotation.frequencies[threadIdx.x % 32]);
}

/// Norms and rotates 16 heads of 512 dims. `at(i, j)`: what this lane gives to ldmatrix for columns
/// 64 i + 16 j and the 15 behind them, heads 0-7 and 8-15, then the same of columns 8 further.
/// `angle`: of this lane's pair. A warp calls. Loops are not wholly unrolled: an item's code is in
/// no cache when the next one begins.
template <typename At>
__device__ __forceinline__ void norm_and_rotate(float eps, const gpu::CosSin& angle, const At& at) {
  constexpr int kHeadDim = 512, kVectors = kHeadDim / 64;
  const int quad = static_cast<int>(threadIdx.x) % 4;
  // Sums of the columns 16 j + 8 h + 2 quad + e modulo 64, as gpu::SquareSums has them: [j][h][e]
  // of either head.
  float sums[2][4][2][2] = {};
#pragma unroll 2
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t pairs[4];
      sm80::load_matrix_x4(pairs, at(i, j));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float(&sum)[2] = sums[m % 2][j][m / 2];
        const float even = gpu::even_of(pairs[m]), odd = gpu::odd_of(pairs[m]);
        sum[0] = __fadd_rn(sum[0], __fmul_rn(even, even));
        sum[1] = __fadd_rn(sum[1], __fmul_rn(odd, odd));
      }
    }
  }
  float factor[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float total[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float half[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        half[h] = __fadd_rn(__fadd_rn(sums[row][0][h][e], sums[row][1][h][e]),
                            __fadd_rn(sums[row][2][h][e], sums[row][3][h][e]));
      }
      total[e] = __fadd_rn(half[0], half[1]);
      total[e] = __fadd_rn(total[e], __shfl_xor_sync(~0u, total[e], 2));
      total[e] = __fadd_rn(total[e], __shfl_xor_sync(~0u, total[e], 1));
    }
    factor[row] = gpu::inverse_rms(__fadd_rn(total[0], total[1]), kHeadDim, eps);
  }
#pragma unroll 2
  for (int i = 0; i < kVectors; ++i) {
    const bool rotates = i == kVectors - 1;  // the last 64 dims
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t pairs[4];
      sm80::load_matrix_x4(pairs, at(i, j));
      float values[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        values[m][0] = __fmul_rn(gpu::even_of(pairs[m]), factor[m % 2]);
        values[m][1] = __fmul_rn(gpu::odd_of(pairs[m]), factor[m % 2]);
      }
      if (rotates) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int pair = 8 * j + 4 * h + quad;
          const float cos = __shfl_sync(~0u, angle.cos, pair),
                      sin = __shfl_sync(~0u, angle.sin, pair);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            float(&value)[2] = values[2 * h + row];
            const float even = value[0], odd = value[1];
            value[0] = __fsub_rn(__fmul_rn(even, cos), __fmul_rn(odd, sin));
            value[1] = __fadd_rn(__fmul_rn(odd, cos), __fmul_rn(even, sin));
          }
        }
      }
      sm90::store_matrix_4(at(i, j), gpu::pack_bf16(values[0][0], values[0][1]),
                           gpu::pack_bf16(values[1][0], values[1][1]),
                           gpu::pack_bf16(values[2][0], values[2][1]),
                           gpu::pack_bf16(values[3][0], values[3][1]));
    }
  }
  __syncwarp();
}

}  // namespace dsv4::nvidia::sm90_attend
