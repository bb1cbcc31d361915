// sm90_index_logits_fp8: scores of FP8 indexer keys by E4M3 warpgroup products.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; up to 64 heads x
//           128 dims; keys of 132 B in pages
// Tiling    An item is two neighbouring tokens of one sequence (or one), a tile 64 keys. All tiles
//           of all items are one list, of which a CTA takes an equal part. Three warps fetch tiles
//           into a ring, a fourth one the items' queries and weights; 4 warpgroups take tiles in
//           turn: keys x queries, 64 x 128 x 128, both in shared memory as the copy engine
//           swizzles them; the sums are folded (ReLU, weight, sum over heads) in the lanes, which
//           keep the item's weights, while the other warpgroups multiply
// Budget    decode: 132 B a key, 528 clocks a tile and multiprocessor at 4.2 TB/s; 99 KiB in
//           flight. Tile and item: 256 clocks of the matrix unit; 258 of shared memory (128 for
//           queries, 64 for keys, 66 for their arrival), about 200 issue slots of each scheduler
// Launch    grid min(multiprocessors, a quarter of the tiles, or up to 32 of few), 640 threads,
//           smem = sizeof(Storage), 1 CTA/SM; before it a small kernel where queries are bf16:
//           their codes
// Contract  dim 128, heads 1..64, pages and queries aligned to 16 bytes; rows of a page a multiple
//           of 64, or a divisor of it from 4 on (else, and for MXFP4 keys, sm80_index_logits runs).
//           All rows of a page are fetched, or all of a tile, also past `end`; blocks are below
//           cache.num_blocks
// Numerics  products of E4M3 are exact; the matrix unit adds them up with about 14 bits (bound:
//           tests/ops/oracle_index_test.cc). Heads 2t, 2t + 1, 8 + 2t, ... of lane t ascending by
//           fma, lanes (0 + 1) + (2 + 3), times k_scale. Nothing depends on tile, item or CTA. NaN
//           stays NaN.
#include <algorithm>
#include <cstddef>

#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/index_logits_sm90_fetch-inl.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/tensor_map.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace sm90_logits {
namespace {

// ---- what the scoring warpgroups do

/// Waits for the products under way; their sums are not read before.
template <int kSums>
__device__ __forceinline__ void wait_for(float (&sums)[kSums]) {
  sm90::wgmma_wait<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum));
}

/// A warpgroup's tile of the CTA's list, counted from 0: turn % kWarpgroups is its number.
struct Turn {
  int32_t turn, stage;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    turn += Traits::kWarpgroups, stage += Traits::kWarpgroups;
    if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;
  }
};

/// A register's worth: the compiler would reckon the value again and again.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  return __shfl_sync(~0u, value, threadIdx.x % 32);
}

/// This warpgroup's tiles of an item of kCount tokens, up to `turn_end`, whose first entry is that
/// of tile `first_tile` at turn 0.
template <int kCount>
__device__ __forceinline__ void score_item(const IndexLogitsArgs& args, Storage& storage, int slot,
                                           int32_t first_tile, Turn& turn, int32_t turn_end) {
  // Lane (g, t) of a warp has rows g, g + 8 of its 16 and heads 8 j + 2 t, + 1; it writes the score
  // of one row, of two tokens that of t / 2.
  const uint32_t lane = kept(threadIdx.x % 32), t = lane % 4;
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  const uint32_t row = kept(threadIdx.x % 128 / 32 * 16 + 8 * (t % 2) + lane / 4);
  const int of_lane = kCount == 2 && upper ? 1 : 0;
  const Slot& item = storage.slots[slot];
  // Every second weight is halved, see below.
  float weights[kCount][16];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&item.weights[k][8 * j + 2 * t]);
      weights[k][2 * j] = pair.x, weights[k][2 * j + 1] = 0.5f * pair.y;
    }
  }
  const int32_t first_row = (first_tile + turn.turn) * Traits::kTile + static_cast<int32_t>(row);
  // From the lane's next score on.
  int32_t left = min(item.end[of_lane], args.max_end) - first_row;
  if (kCount == 1 && upper) left = 0;
  float* logits = args.logits + (item.part.first + of_lane) * args.logits_stride + first_row;
  const uint64_t queries = sm90::fp8_operand(shared_address(&storage.queries[slot]));
#pragma unroll 1
  for (; turn.turn < turn_end; turn.advance()) {
    sm90::mbarrier_wait(shared_address(&storage.full[turn.stage]), turn.parity);
    const float scale = storage.scales[turn.stage][row];
    const uint64_t keys = sm90::fp8_operand(shared_address(&storage.keys[turn.stage]));
    float dots[32 * kCount];
    using Product = sm90::Fp8Product<64 * kCount>;
    sm90::wgmma_fence();
    Product::template run<false>(dots, keys, queries);
#pragma unroll
    for (int s = 1; s < kIndexDim / 32; ++s) {
      Product::template run<true>(dots, sm90::next_operand(keys, 32 * s),
                                  sm90::next_operand(queries, 32 * s));
    }
    sm90::wgmma_commit();
    wait_for(dots);
    // That the scale has landed, too, is an operand of the arrival (args.nothing is 0): an arrival
    // alone overtakes loads.
    sm90::mbarrier_arrive(shared_address(&storage.empty[turn.stage]) +
                          (__float_as_uint(scale) & args.nothing));
    float sums[kCount][2] = {};  // rows g, g + 8
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* dot = dots + 32 * k + 4 * j + 2 * r;
          // max(x, 0) takes a pipe of half the rate: every second one is the half of x + |x|, which
          // is exact (dots are finite, or NaN).
          float sum = sums[k][r];
          sum = __fmaf_rn(weights[k][2 * j], sm80::max_nan(dot[0], 0.0f), sum);
          sum = __fmaf_rn(weights[k][2 * j + 1], __fadd_rn(dot[1], fabsf(dot[1])), sum);
          sums[k][r] = sum;
        }
      }
    }
    // Lanes (0 + 1) + (2 + 3); lane t is left with row g + 8 (t & 1), of token t / 2 where there
    // are two.
    float halves[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      halves[k] =
          (odd ? sums[k][1] : sums[k][0]) + __shfl_xor_sync(~0u, odd ? sums[k][0] : sums[k][1], 1);
    }
    const float mine = upper ? halves[kCount - 1] : halves[0];
    const float other = upper ? halves[0] : halves[kCount - 1];
    const float sum = mine + __shfl_xor_sync(~0u, other, 2);
    if (left > 0) *logits = __fmul_rn(sum, scale);
    left -= Traits::kWarpgroups * Traits::kTile, logits += Traits::kWarpgroups * Traits::kTile;
  }
}

__device__ __forceinline__ void score_tiles(const IndexLogitsArgs& args, Storage& storage) {
  const int32_t warpgroup = uniform(threadIdx.x / 128);
  Turn turn{warpgroup, warpgroup};
  int32_t begin = 0;
  sm90::RingPlace<Traits::kSlots> place;
  for (;; place.advance()) {
    sm90::mbarrier_wait(shared_address(&storage.queries_full[place.stage]), place.phase);
    const Part& part = storage.slots[place.stage].part;
    const int32_t count = uniform(part.count);
    if (count == 0) return;
    const int32_t first_tile = uniform(part.tile), tiles = uniform(part.tile_end) - first_tile;
    if (turn.turn < begin + tiles) {
      if (count == 2) {
        score_item<2>(args, storage, place.stage, first_tile - begin, turn, begin + tiles);
      } else {
        score_item<1>(args, storage, place.stage, first_tile - begin, turn, begin + tiles);
      }
    }
    begin += tiles;
    sm90::mbarrier_arrive(shared_address(&storage.queries_empty[place.stage]));
  }
}

__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_index_logits_fp8(const __grid_constant__ LaunchArgs launch) {
  extern __shared__ __align__(1024) std::byte shared[];
  auto& storage = *reinterpret_cast<Storage*>(shared);
  const IndexLogitsArgs& args = launch.args;
  const int warpgroup = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x % 128 / 32);
  const bool scores = warpgroup < Traits::kWarpgroups;
  if (threadIdx.x == Traits::kThreads - 32) {
    for (int s = 0; s < Traits::kStages; ++s) {
      sm90::mbarrier_init(shared_address(&storage.full[s]), 1);
      sm90::mbarrier_init(shared_address(&storage.empty[s]), 128);
    }
    for (int s = 0; s < Traits::kSlots; ++s) {
      sm90::mbarrier_init(shared_address(&storage.queries_full[s]), 1 + 32);
      sm90::mbarrier_init(shared_address(&storage.queries_empty[s]), 128 * Traits::kWarpgroups);
    }
    sm90::fence_barrier_init();
  } else if (threadIdx.x == 128 * Traits::kWarpgroups) {
    sm90::prefetch_map(launch.keys);
    sm90::prefetch_map(launch.queries);
  }
  __syncthreads();
  follow_kernels_before();
  touch_first_row(args);
  Walk walk{};
  if (args.num_tokens > 32) {
    walk = find_part_of_many(args, storage);
  } else if (!scores) {
    walk = find_part_of_few(args, storage);
  }
  if (scores) {
    sm90::increase_registers<Traits::kScoreRegisters>();
    score_tiles(args, storage);
  } else {
    sm90::decrease_registers<Traits::kFetchRegisters>();
    if (warp < Traits::kKeyWarps) {
      fetch_keys(launch, storage, walk, warp);
    } else if (warp == Traits::kKeyWarps) {
      fetch_queries(launch, storage, walk);
    }
  }
}

// ---- queries that are no codes yet

/// A thread's 16 dims.
__global__ void __launch_bounds__(256)
    index_query_codes(const uint16_t* q, int64_t token_stride, int64_t head_stride, int32_t heads,
                      int64_t pieces, uint4* codes) {
  follow_kernels_before();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= pieces) return;
  const int64_t row = i / 8;
  const auto* from = reinterpret_cast<const uint4*>(q + row / heads * token_stride +
                                                    row % heads * head_stride + i % 8 * 16);
  const auto codes_of = [](uint32_t low, uint32_t high) {
    const auto pair = [](uint32_t bf16s) {
      return sm90::e4m3x2(__uint_as_float(bf16s << 16), __uint_as_float(bf16s & 0xffff0000u));
    };
    return pair(low) | pair(high) << 16;
  };
  const uint4 a = __ldg(from), b = __ldg(from + 1);
  codes[i] = {codes_of(a.x, a.y), codes_of(a.z, a.w), codes_of(b.x, b.y), codes_of(b.z, b.w)};
}

}  // namespace
}  // namespace sm90_logits

void index_logits_sm90(const IndexLogitsParams& params, const OpContext& context) {
  using namespace sm90_logits;
  constexpr int kTile = Traits::kTile;
  const int32_t rows = params.cache.rows_per_block;
  const bool runs = rows % kTile == 0 || (rows % 4 == 0 && kTile % rows == 0);
  if (params.cache.format != KvFormat::kIndexFp8 || !runs || !index_rows_aligned(params)) {
    return index_logits_sm80(params, context);
  }
  const Arena::Scope scope(*context.scratch);
  ConstTensor q = params.q;
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  const bool has_codes = q.dtype == DType::kF8E4M3;
  Tensor codes;
  if (!has_codes) codes = context.scratch->take_tensor(DType::kF8E4M3, {tokens, heads, kIndexDim});
  LaunchArgs args{.args = index_logits_args(params), .queries = {}, .keys = {}};
  if (context.scratch->measuring() || tokens == 0 || args.args.max_end == 0) return;
  const cudaStream_t stream = stream_of(context.stream);
  if (!has_codes) {
    const int64_t pieces = tokens * heads * (kIndexDim / 16);
    launch<index_query_codes>({dim3(static_cast<unsigned>(ceil_div(pieces, int64_t{256}))), 256},
                              stream, q.as<uint16_t>(), q.strides[0], q.strides[1],
                              static_cast<int32_t>(heads), pieces, codes.as<uint4>());
    q = codes;
  }
  args.queries =
      byte_map_3d(q.data, q.strides[1], q.strides[0], tokens, heads, kIndexDim, kIndexMaxHeads);
  args.keys = byte_map_3d(params.cache.base, kIndexDim, params.cache.block_stride_bytes,
                          params.cache.num_blocks, rows, kIndexDim, std::min(rows, kTile));
  const int64_t most = tokens * ceil_div(args.args.max_end, kTile);
  const int64_t wanted =
      std::max(std::min(most, Traits::kEnough), ceil_div(most, int64_t{Traits::kWarpgroups}));
  const auto ctas = static_cast<unsigned>(std::min(int64_t{num_multiprocessors()}, wanted));
  // The inverse of 1 does not fit; the share comes out one too small, and that tile is left over.
  args.args.per_cta =
      static_cast<uint32_t>(std::min((int64_t{1} << 32) / ctas + 1, (int64_t{1} << 32) - 1));
  launch<sm90_index_logits_fp8>({dim3(ctas), Traits::kThreads, sizeof(Storage)}, stream, args);
}

}  // namespace dsv4::nvidia
