// The parts of the sm_90 products: a ring that the copy engine fills, warpgroups that multiply.
// Included by kernels only; see linear_sm90a.cu.
#pragma once
#include <cuda_bf16.h>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/linear_sm90_x-inl.h"
#include "backends/nvidia/ops/linear_weight-inl.h"

namespace dsv4::nvidia {

/// A tile: 128 rows of W x kN tokens. kWalks: a block takes tile after tile, otherwise one.
template <DType kDType, int kN, bool kWalks>
struct Sm90Tile {
  static constexpr int kRows = 128;
  static constexpr int kWarps = 8;      ///< that multiply, 16 rows each
  static constexpr int kThreads = 384;  ///< one more warpgroup copies
  /// What else a step reads, and code, stays in the L2 then. FP8 weights of 64 tokens and more: a
  /// layer was 1% slower.
  static constexpr bool kReadsWOnce = kN <= 32 || (kDType == DType::kBf16 && !kWalks);
  static constexpr int kBlocksPerSm = kWalks || kN == 128 ? 1 : 2;
  /// Registers of the two roles where an even share is too little for the sums; 0: it is not.
  static constexpr int kCopyRegisters = kWalks || kN == 64 ? 40 : 0;
  static constexpr int kMultiplyRegisters = kWalks ? 232 : 96;
  /// A stage is 128 bytes of every row of W: two panels of FP8, one of bf16.
  static constexpr int kPanels = kDType == DType::kF8E4M3 ? 2 : 1;
  static constexpr int kWBytes = kRows * 128;
  /// Halves of a panel that are expanded before their products start; more of them cost registers.
  static constexpr int kHalves = kDType == DType::kF8E4M3 && kN < 128 ? 2 : 1;
  static constexpr bool kReadsAhead = true;
  static constexpr int kXPanelBytes = kN * 128;
  static constexpr int kStageBytes = kWBytes + kPanels * kXPanelBytes;
  /// Sums on their way out, [token][row]: 4 more floats spread the banks. Where a block has one
  /// tile only they take the place of the ring.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kN * kSumStride * 4;
  static constexpr int kRingLimit =
      ((kBlocksPerSm == 1 ? 226 : 112) << 10) - (kWalks ? kSumBytes : 0) - 1024;
  static constexpr int kStages = kRingLimit / kStageBytes < 8 ? kRingLimit / kStageBytes : 8;
  static_assert(kStages >= 2 && (kWalks || kStages * kStageBytes >= kSumBytes));
};

/// A ring as a warpgroup sees it: addresses in shared memory.
struct Sm90Ring {
  uint32_t stages, full, empty;
};
template <typename Tile>
__device__ __forceinline__ Sm90Ring make_ring(std::byte (&stages)[Tile::kStages][Tile::kStageBytes],
                                              uint64_t (&full)[Tile::kStages],
                                              uint64_t (&empty)[Tile::kStages]) {
  return {sm80::shared_address(stages), sm80::shared_address(full), sm80::shared_address(empty)};
}

template <typename Tile, bool kWalks>
struct Sm90Shared {
  alignas(1024) std::byte ring[Tile::kStages][Tile::kStageBytes];
  alignas(16) std::byte sums_if_walking[kWalks ? Tile::kSumBytes : 16];
  uint64_t full[Tile::kStages], empty[Tile::kStages];
  __device__ __forceinline__ float* sums() {
    return reinterpret_cast<float*>(kWalks ? sums_if_walking : ring[0]);
  }
  __device__ __forceinline__ Sm90Ring whole_ring() { return make_ring<Tile>(ring, full, empty); }
};

/// A tile of a product, and the panels of K that a block takes.
struct Sm90Work {
  const Sm90Item* item;
  int row0, token0;
  int panel_begin, panel_end;
};

/// Tile `tile` of the batch; tokens vary fastest.
template <typename Tile, int kN>
__device__ __forceinline__ Sm90Work find_work(const Sm90Batch& batch, int tile) {
  int i = 0;
  while (i + 1 < batch.count && tile >= batch.items[i + 1].first_tile) ++i;
  const Sm90Item& item = batch.items[i];
  const int token_tiles = (item.tokens + kN - 1) / kN;
  const int idx = tile - item.first_tile;
  return {.item = &item,
          .row0 = idx / token_tiles * Tile::kRows,
          .token0 = idx % token_tiles * kN,
          .panel_begin = 0,
          .panel_end = sm90_num_panels(item.w.cols)};
}

/// Asks for the panels of `work`; one thread calls. `first`: of this block; W does not depend on
/// earlier kernels, so as much of it as fits is asked for before they have ended.
template <typename Tile, typename Shared, typename Place>
__device__ __forceinline__ void copy_tile(const Sm90Work& work, bool first, Shared& shared,
                                          Place& place) {
  const Sm90Item& item = *work.item;
  const auto expect_w = [&](int panel, int stage) {
    const uint32_t full = sm80::shared_address(&shared.full[stage]);
    sm90::mbarrier_arrive_expecting(full, Tile::kStageBytes);
    sm90::copy_box<Tile::kReadsWOnce>(sm80::shared_address(shared.ring[stage]), item.w_map,
                                      panel / Tile::kPanels * 128, work.row0, full);
  };
  const int steps = (work.panel_end - work.panel_begin + Tile::kPanels - 1) / Tile::kPanels;
  const int early = first ? min(Tile::kStages, steps) : 0;
  for (int i = 0; i < early; ++i) expect_w(work.panel_begin + i * Tile::kPanels, i);
  if (first) sm90::wait_for_kernels_before();
  for (int i = 0; i < steps; ++i) {
    const int panel = work.panel_begin + i * Tile::kPanels;
    if (i >= early) {
      sm90::mbarrier_wait(sm80::shared_address(&shared.empty[place.stage]), place.phase ^ 1);
      expect_w(panel, place.stage);
    }
    const uint32_t full = sm80::shared_address(&shared.full[place.stage]);
    const uint32_t to = sm80::shared_address(shared.ring[place.stage]) + Tile::kWBytes;
#pragma unroll
    for (int p = 0; p < Tile::kPanels; ++p) {
      sm90::copy_box(to + p * Tile::kXPanelBytes, item.x_map, 0,
                     static_cast<int>((panel + p) * item.x_rows) + work.token0, full);
    }
    place.advance();
  }
}

/// Half a panel, 32 columns, of rows g and g + 8 as operands of two products, out of what this lane
/// read of them: 16 bytes that hold the half (bf16) or the panel (FP8). Without factor.rest.
template <DType kDType>
__device__ __forceinline__ void expand_half(const uint4& low, const uint4& high, int half,
                                            const typename Format<kDType>::Factor& factor,
                                            uint32_t (&a)[8]) {
  using F = Format<kDType>;
  uint32_t pairs_low[4], pairs_high[4];
  if constexpr (F::kScaled) {
    F::expand_first(low, half, factor, pairs_low);
    F::expand_first(high, half, factor, pairs_high);
  } else {
    F::expand(low, 0, factor, pairs_low);
    F::expand(high, 0, factor, pairs_high);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = pairs_low[2 * i], a[4 * i + 1] = pairs_high[2 * i];
    a[4 * i + 2] = pairs_low[2 * i + 1], a[4 * i + 3] = pairs_high[2 * i + 1];
  }
}

/// Scales of the 64 rows from `row0` of a product: lane l asks for that of the l-th block of 128
/// columns from panel `begin`. Asked for long before its use: it comes from far away.
template <DType kDType>
__device__ __forceinline__ uint32_t load_scales(const LinearWeight& w, int row0, int begin) {
  if constexpr (!Format<kDType>::kScaled) return 0;
  const uint8_t* of_rows = w.scale + min(row0, w.rows - 1) / w.block_rows * w.scale_stride;
  const int block = begin / 2 + static_cast<int>(threadIdx.x) % 32;
  return __ldg(of_rows + min(block, (w.cols - 1) / 128));
}

/// Row of W, of the 16 of a warp, that a lane holds as row lane / 4 of an operand, and as lane / 4
/// + 8 the one 8 further. In this order the 8 lanes that shared memory serves at a time meet all
/// banks: units of rows r and r + 4 lie apart.
__device__ __forceinline__ int row_of_lane() {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  return g % 2 * 4 + g / 2;
}

/// This warp of the block.
__device__ __forceinline__ int warp_of_block() {
  return sm90::uniform(static_cast<int>(threadIdx.x) / 32);
}

__device__ __forceinline__ void release_stage(uint32_t empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) sm90::mbarrier_arrive(empty);
}

/// sums = the products of the panels [begin, end) with the 64 rows from `row` of the tile, one
/// chain from zero. While the tensor cores work on some columns the next ones are expanded.
/// `scales`: load_scales(begin).
template <typename Tile, DType kDType, int kN, typename Place>
__device__ __forceinline__ void multiply_panels(const Sm90Work& work, int row, uint32_t scales,
                                                int begin, int end, const Sm90Ring& ring,
                                                Place& place, float (&sums)[kN / 2]) {
  using F = Format<kDType>;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4,
            lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (float& sum : sums) sum = 0;
  const uint32_t w_unit = (lane % 4 ^ row_of_lane()) * 16;
  const uint32_t codes_at = ring.stages + (row + warp * 16 + row_of_lane()) * 128 + w_unit;
  typename F::Factor of_lane = F::factor(scales);
  uint32_t large_blocks = 0;
  if constexpr (F::kScaled) large_blocks = __ballot_sync(0xffffffffu, of_lane.large);
  uint32_t previous = 0;  // stage's `empty`
  int block = 0;
  const int steps = (end - begin + Tile::kPanels - 1) / Tile::kPanels;
  for (int i = 0; i < steps; ++i) {
    typename F::Factor factor{};
    if constexpr (F::kScaled) {
      if (block == 32) {
        scales = load_scales<kDType>(work.item->w, work.row0 + row, begin + i * Tile::kPanels);
        of_lane = F::factor(scales);
        large_blocks = __ballot_sync(0xffffffffu, of_lane.large);
        block = 0;
      }
      factor.first = __shfl_sync(0xffffffffu, of_lane.first, block);
      factor.large = (large_blocks >> block & 1) != 0;
      if (factor.large) factor.rest = F::factor(__shfl_sync(0xffffffffu, scales, block)).rest;
      ++block;
    }
    sm90::mbarrier_wait(ring.full + place.stage * 8, place.phase);
    const uint32_t stage = place.stage * Tile::kStageBytes;
    uint4 codes[2][2];
    const auto read_codes = [&](int p) {
      const uint32_t from = (codes_at ^ p * 64) + stage;
      codes[p][0] = sm80::load_shared_16(from);
      codes[p][1] = sm80::load_shared_16(from + 8 * 128);
    };
    read_codes(0);
    // All of a stage at once where registers allow: the products that run slow these reads down.
    if constexpr (Tile::kReadsAhead) read_codes(1);
#pragma unroll
    for (int p = 0; p < Tile::kPanels; ++p) {
      const uint64_t b = sm90::swizzled_operand(
          ring.stages + stage + Tile::kWBytes + p * Tile::kXPanelBytes, 16, 1024);
      if (!Tile::kReadsAhead && p == 1) read_codes(1);
      const auto b_low = static_cast<uint32_t>(b), b_high = static_cast<uint32_t>(b >> 32);
#pragma unroll
      for (int step = 0; step < 2 / Tile::kHalves; ++step) {
        uint32_t a[Tile::kHalves][8];
#pragma unroll
        for (int h = 0; h < Tile::kHalves; ++h) {
          const int half = step * Tile::kHalves + h;
          const uint4(&from)[2] = codes[F::kScaled ? p : half];
          expand_half<kDType>(from[0], from[1], half, factor, a[h]);
        }
        if constexpr (F::kScaled) {
          if (factor.large) {
#pragma unroll
            for (int h = 0; h < Tile::kHalves; ++h) F::apply_rest(factor, a[h]);
          }
        }
        sm90::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2 * Tile::kHalves; ++k) {
          sm90::RegisterProduct<kN>::run(
              sums, a[k / 2] + k % 2 * 4,
              uint64_t{b_high} << 32 | (b_low + static_cast<uint32_t>(sm90::operand_offset(
                                                    32 * (2 * step * Tile::kHalves + k)))));
        }
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        if (p == 0 && step == 0 && i > 0) release_stage(previous);
      }
    }
    previous = ring.empty + place.stage * 8;
    place.advance();
  }
  sm90::wgmma_wait<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");  // read after the wait only
  if (steps > 0) release_stage(previous);
}

template <typename Tile, int kN>
__device__ __forceinline__ void put_sums(float* to, const float (&sums)[kN / 2]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp * 16 + row_of_lane();
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[(8 * j + 2 * (lane % 4) + i % 2) * Tile::kSumStride + row + 8 * (i / 2)] = sums[4 * j + i];
  }
}

/// Four rows of a token; what lies beyond the ends is dropped.
__device__ __forceinline__ void store_rows(const Sm90Item& item, int token, int row,
                                           const float4& values) {
  if (token >= item.tokens || row >= item.w.rows) return;
  const int64_t element = token * item.out_stride + row;
  const bool whole = row + 4 <= item.w.rows;
  if (item.out_f32) {
    float* to = static_cast<float*>(item.out) + element;
    if (whole && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<float4*>(to) = values;
      return;
    }
    const float each[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < item.w.rows) to[i] = each[i];
    }
  } else {
    auto* to = static_cast<uint16_t*>(item.out) + element;
    const uint32_t low = sm80::pack_bf16x2(values.x, values.y);
    const uint32_t high = sm80::pack_bf16x2(values.z, values.w);
    if (whole && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
      return;
    }
    const uint32_t each[4] = {low, low >> 16, high, high >> 16};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < item.w.rows) to[i] = static_cast<uint16_t>(each[i]);
    }
  }
}

template <typename Tile>
__device__ __forceinline__ void take_copy_role() {
  if constexpr (Tile::kCopyRegisters > 0) sm90::decrease_registers<Tile::kCopyRegisters>();
}
template <typename Tile>
__device__ __forceinline__ void take_multiply_role() {
  if constexpr (Tile::kCopyRegisters > 0) sm90::increase_registers<Tile::kMultiplyRegisters>();
}

template <typename Tile, typename Shared>
__device__ __forceinline__ void init_barriers(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      sm90::mbarrier_init(sm80::shared_address(&shared.full[s]), 1);
      sm90::mbarrier_init(sm80::shared_address(&shared.empty[s]), Tile::kWarps);
    }
    sm90::fence_barrier_init();
  }
}

}  // namespace dsv4::nvidia
