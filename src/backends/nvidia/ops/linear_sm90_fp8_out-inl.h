// Outputs of the FP8 products of sm_90 from accumulators to memory: through shared memory, from
// where the copy engine takes them while the next tile is multiplied, or by the warp itself.
// Included by the kernel only.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/cluster.h"
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

/// Where 16-byte unit `unit` of a token's outputs lies on its way out: panels of up to 128 bytes a
/// row, swizzled within a panel as the copy engine has it.
template <typename Tile>
__device__ __forceinline__ uint32_t out_unit(uint32_t staging, int token, int unit) {
  constexpr int kPanelBytes = Tile::kN < 64 ? Tile::kN * 2 : 128;
  constexpr int kUnits = kPanelBytes / 16;
  const int line = token * kPanelBytes / 128;
  return staging + unit / kUnits * (16 * kPanelBytes) + token * kPanelBytes +
         (unit % kUnits ^ line % kUnits) * 16;
}

/// What the other block of a pair says of its half of the rows that share a scale: the largest
/// magnitudes of a warp's tokens. Two places, as it may be one tile ahead.
template <int kWarps>
struct Fp8Other {
  alignas(16) float2 largest[kWarps][2][8];
  uint64_t told[kWarps][2];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < 2 * kWarps; ++i)
      sm90::mbarrier_init(sm80::shared_address(&told[i / 2][i % 2]), 1);
  }
  /// Of tokens g and g + 8, in both blocks; a warp calls.
  __device__ __forceinline__ uint2 larger(int warp, int lane, int turn, uint2 own) {
    const int place = turn % 2;
    const uint32_t to = sm80::shared_address(&largest[warp][place][lane / 4]);
    const uint32_t barrier = sm80::shared_address(&told[warp][place]);
    const uint32_t rank = sm90::cluster_rank() ^ 1;
    if (lane == 0) sm90::mbarrier_expect_bytes(barrier, sizeof(largest[warp][place]));
    if (lane % 4 == 0) {
      sm90::cluster_store_async(sm90::cluster_address(to, rank), __uint_as_float(own.x),
                                __uint_as_float(own.y), sm90::cluster_address(barrier, rank));
    }
    sm90::mbarrier_wait(barrier, turn / 2 % 2);
    const float2 other = largest[warp][place][lane / 4];
    return {max(own.x, __float_as_uint(other.x)), max(own.y, __float_as_uint(other.y))};
  }
};
template <>
struct Fp8Other<0> {};

/// The largest magnitude of a token's values in bf16; `half`: of tokens g or g + 8.
template <int kCount>
__device__ __forceinline__ uint32_t largest_of_token(const float (&totals)[kCount], int half) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    largest = max(largest, larger_magnitude(sm80::pack_bf16x2(totals[4 * j + 2 * half],
                                                              totals[4 * j + 2 * half + 1])));
  }
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
}

/// Codes of a warp's tokens in bf16 and their scales. `larger`: largest magnitudes of tokens g and
/// g + 8 in all 128 rows, of those in the tile; `put(token, row, codes)`: four codes.
template <typename Tile, typename Larger, typename Put>
__device__ __forceinline__ void make_codes(const Fp8Item& item, int token0, int row0, int lane,
                                           const float (&totals)[Tile::kN / 2], Larger larger,
                                           Put put) {
  const bool both = token0 + 8 < item.tokens;
  const uint2 largest =
      larger(uint2{largest_of_token(totals, 0), both ? largest_of_token(totals, 1) : 0});
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && !both) break;
    const GroupScale scale = group_scale(half == 0 ? largest.x : largest.y, kQuantiseFloor);
    const int token = lane / 4 + 8 * half;
    if (lane % 4 == 0 && row0 % kQuantiseGroup == 0 && token0 + token < item.tokens) {
      item.out_scale[row0 / kQuantiseGroup * item.out_scale_stride + token0 + token] =
          scale.value();
    }
    const auto codes = [&](int i) {
      return scale.codes(sm80::pack_bf16x2(totals[4 * i + 2 * half], totals[4 * i + 2 * half + 1]));
    };
    // Neighbours swap halves, so that each has four codes in a row.
    const int within = (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < Tile::kN / 8; j += 2) {
      const uint32_t first = codes(j), second = codes(j + 1);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      put(token, 8 * j + within, odd ? other | second << 16 : first | other << 16);
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
