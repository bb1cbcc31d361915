// Outputs of the FP8 products of sm_90 from accumulators to memory: through shared memory, from
// where the copy engine takes them while the next tile is multiplied, or by the warp itself.
// Included by the kernel only.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"

namespace dsv4::nvidia {

/// 16 bytes of a token's row of out; what lies beyond the end is dropped.
__device__ __forceinline__ void store_eight(const Fp8Item& item, int token, int row,
                                            const uint4& values) {
  if (token >= item.tokens || row >= item.w.rows) return;
  auto* to = static_cast<uint16_t*>(item.out) + token * item.out_stride + row;
  if (row + 8 <= item.w.rows && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = values;
    return;
  }
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row + i < item.w.rows) to[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
}

/// Two f32 outputs of a token.
__device__ __forceinline__ void store_pair(const Fp8Item& item, int token, int row, float x,
                                           float y) {
  if (token >= item.tokens || row >= item.w.rows) return;
  float* to = static_cast<float*>(item.out) + token * item.out_stride + row;
  if (row + 2 <= item.w.rows && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<float2*>(to) = {x, y};
    return;
  }
  to[0] = x;
  if (row + 1 < item.w.rows) to[1] = y;
}

/// Where 16-byte unit `unit` of a token's outputs lies on its way out, swizzled within a panel as
/// the copy engine has it.
template <typename Tile>
__device__ __forceinline__ uint32_t out_unit(uint32_t staging, int token, int unit) {
  constexpr int kUnits = Tile::kPanelBytes / 16;
  const int line = token * Tile::kPanelBytes / 128;
  return staging + unit / kUnits * (16 * Tile::kPanelBytes) + token * Tile::kPanelBytes +
         (unit % kUnits ^ line % kUnits) * 16;
}

/// Codes of a token's values in bf16 and their scale, where the tile holds whole groups of 128.
template <typename Tile>
__device__ __forceinline__ void stage_codes(const Fp8Item& item, int token0, int row0, int lane,
                                            uint32_t staging, const float (&totals)[Tile::kN / 2]) {
  static_assert(Tile::kN == kQuantiseGroup);
  constexpr int kPairs = Tile::kN / 8;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // tokens g, g + 8
    uint32_t pairs[kPairs], largest = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      pairs[j] = sm80::pack_bf16x2(totals[4 * j + 2 * half], totals[4 * j + 2 * half + 1]);
      largest = max(largest, larger_magnitude(pairs[j]));
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    const GroupScale scale = group_scale(largest, kQuantiseFloor);
    const int token = lane / 4 + 8 * half;
    if (lane % 4 == 0 && token0 + token < item.tokens) {
      item.out_scale[row0 / kQuantiseGroup * item.out_scale_stride + token0 + token] =
          scale.value();
    }
    // Neighbours swap halves, so that each has four codes in a row.
    const uint32_t within = (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      const uint32_t first = scale.codes(pairs[j]), second = scale.codes(pairs[j + 1]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      sm90::store_shared(out_unit<Tile>(staging, token, j / 2) + within,
                         odd ? other | second << 16 : first | other << 16);
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void stage_values(int lane, uint32_t staging,
                                             const float (&totals)[Tile::kN / 2]) {
  // Lane 8 i + j gives row j of matrix i: tokens 0..7 and 8..15 of 8 columns, then of the next 8.
  const int token = lane % 8 + lane / 8 % 2 * 8;
#pragma unroll
  for (int j = 0; j < Tile::kN / 16; ++j) {
    const float* sums = totals + 8 * j;
    sm90::store_matrix_4(out_unit<Tile>(staging, token, 2 * j + lane / 16),
                         sm80::pack_bf16x2(sums[0], sums[1]), sm80::pack_bf16x2(sums[2], sums[3]),
                         sm80::pack_bf16x2(sums[4], sums[5]), sm80::pack_bf16x2(sums[6], sums[7]));
  }
}

/// Values that were staged, by the warp itself: any alignment.
template <typename Tile>
__device__ __forceinline__ void copy_staged(const Fp8Item& item, int token0, int row0, int lane,
                                            uint32_t staging) {
  constexpr int kRowUnits = Tile::kN / 8;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRowUnits / 2; ++i) {
    const int idx = i * 32 + lane, token = token0 + idx / kRowUnits, unit = idx % kRowUnits;
    store_eight(item, token, row0 + unit * 8,
                sm80::load_shared_16(out_unit<Tile>(staging, idx / kRowUnits, unit)));
  }
}

}  // namespace dsv4::nvidia
