// sm90_index_logits_fp8: scores of FP8 indexer keys by E4M3 warpgroup products.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; up to 64 heads x
//           128 dims; keys of 132 B in pages
// Tiling    An item is up to 8 neighbouring tokens of one sequence, a tile 64 keys. All tiles of
//           all items are one list, of which a CTA takes an equal part (several items, or a part of
//           one; whole items where that is two tiles more at most). Two warps fetch tiles as bulk
//           copies into a ring; 4 warpgroups take tiles in turn: keys go to registers as the left
//           operand (the place in the ring is free again then) and meet two tokens at a time, 64 x
//           128 x 128, whose sums are folded (ReLU, weight, sum over heads) in the lanes while the
//           other warpgroups multiply. At every tile they put down the queries of a token of the
//           next item as E4M3 codes, and ask for another one
// Budget    decode: 132 B a key, 528 clocks a tile and multiprocessor at 4.2 TB/s, of which the
//           matrix unit works 128; 66 KiB in flight. Prefill: a tile and token takes 128 clocks of
//           the matrix unit, 64 of shared memory for queries and 64 for weights, about 90 issue
//           slots of each scheduler
// Launch    grid min(multiprocessors, most tiles), 640 threads, smem = sizeof(Storage), 1 CTA/SM
// Contract  dim 128, heads 1..64, pages and queries aligned to 16 bytes; rows of a page a multiple
//           of 64, or a divisor of it from 4 on (else, and for MXFP4 keys, sm80_index_logits runs).
//           Rows of a page are fetched up to the next multiple of 4 after `end`
// Numerics  products of E4M3 are exact; the matrix unit adds them up with about 14 bits (bound:
//           tests/ops/oracle_index_test.cc). Heads 2t, 2t + 1, 8 + 2t, ... of lane t ascending by
//           fma, lanes (0 + 1) + (2 + 3), times k_scale. Nothing depends on tile, item or CTA. NaN
//           stays NaN.
#include <algorithm>
#include <cstddef>

#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/index_logits_sm90_fetch-inl.h"
#include "backends/nvidia/ops/launch.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace sm90_logits {
namespace {

// ---- what the scoring warpgroups do

/// What lies `bytes` after `from`.
template <typename T>
__device__ __forceinline__ const T& at(const void* from, uint32_t bytes) {
  return *reinterpret_cast<const T*>(static_cast<const std::byte*>(from) + bytes);
}

/// Lane (g, t) of a warp of a warpgroup; where it finds things, in bytes.
struct Lane {
  uint32_t keys;  // its row g in a Stage; lanes of odd rows read the other half first: 8 lanes that
                  // are served together then find different banks
  uint32_t weights;  // of a Token
  uint32_t end;      // of the Token, of two the one whose score the lane writes
  int32_t row;       // whose score the lane writes

  __device__ __forceinline__ Lane() {
    const uint32_t thread = threadIdx.x % 128, warp = thread / 32, g = thread % 32 / 4,
                   t = thread % 4;
    keys = kept((16 * warp + g) * kIndexDim + g % 2 * 64 + 16 * t);
    weights = kept(16 * t);
    end = kept(static_cast<uint32_t>(offsetof(Token, end)) + t / 2 * sizeof(Token));
    row = static_cast<int32_t>(kept(16 * warp + 8 * (t % 2) + g));
  }
  __device__ bool odd_row() const { return (keys & 64) != 0; }
  __device__ bool odd() const { return (weights & 16) != 0; }
  __device__ bool upper() const { return (weights & 32) != 0; }

 private:
  /// A register's worth: the compiler would reckon the value again and again.
  __device__ static uint32_t kept(uint32_t value) {
    return __shfl_sync(~0u, value, threadIdx.x % 32);
  }
};

/// A lane's part of a tile: rows g, g + 8 of its warp's 16; dims [16 t, 16 t + 16) and [64 + 16 t,
/// 64 + 16 t + 16).
struct KeyRegisters {
  uint32_t words[2][8];
  float scale;  // of row g (t even) or g + 8

  __device__ __forceinline__ KeyRegisters(const Stage& stage, const Lane& lane) {
    const bool odd = lane.odd_row();
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      const uint4 a = at<uint4>(&stage, lane.keys + 8 * r * kIndexDim);
      const uint4 b = at<uint4>(&stage, (lane.keys ^ 64) + 8 * r * kIndexDim);
      words[r][0] = odd ? b.x : a.x, words[r][4] = odd ? a.x : b.x;
      words[r][1] = odd ? b.y : a.y, words[r][5] = odd ? a.y : b.y;
      words[r][2] = odd ? b.z : a.z, words[r][6] = odd ? a.z : b.z;
      words[r][3] = odd ? b.w : a.w, words[r][7] = odd ? a.w : b.w;
    }
    scale = stage.scales[lane.row];
  }
};

/// Starts the products of a tile with the queries of one token (32 sums a lane) or of two
/// neighbours (64).
template <int kSums>
__device__ __forceinline__ void multiply(float (&dots)[kSums], const KeyRegisters& keys,
                                         const Queries& queries) {
  const uint64_t first = sm90::fp8_operand(shared_address(queries.units));
  sm90::wgmma_fence();
#pragma unroll
  for (int s = 0; s < Traits::kSteps; ++s) {
    const uint32_t a0 = keys.words[0][2 * s], a1 = keys.words[1][2 * s];
    const uint32_t a2 = keys.words[0][2 * s + 1], a3 = keys.words[1][2 * s + 1];
    const uint64_t b = sm90::next_operand(first, 32 * s);
    if constexpr (kSums == 32) {
      sm90::wgmma_64x64x32_e4m3(dots, a0, a1, a2, a3, b, s > 0);
    } else {
      sm90::wgmma_64x128x32_e4m3(dots, a0, a1, a2, a3, b, s > 0);
    }
  }
  sm90::wgmma_commit();
}

/// Waits for the products under way; their sums are not read before.
template <int kSums>
__device__ __forceinline__ void wait_for(float (&sums)[kSums]) {
  sm90::wgmma_wait<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum));
}

/// Scores of a tile for kCount tokens, 1 or 2: products, `beside` while they are under way, then
/// the heads are folded. `logits` is where the lane's score belongs.
template <int kCount, typename Beside>
__device__ __forceinline__ void score(const KeyRegisters& keys, const Queries* queries,
                                      const Token* tokens, int32_t row, float* logits,
                                      const Lane& lane, Beside beside) {
  const bool odd = lane.odd(), upper = lane.upper();
  const float scale = keys.scale;
  float dots[32 * kCount];
  multiply(dots, keys, queries[0]);
  beside();
  // What folding begins and ends with is on its way meanwhile.
  float4 weights[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) weights[k] = at<float4>(tokens + k, lane.weights);
  const int32_t end = kCount == 2 ? at<int32_t>(tokens, lane.end) : tokens[0].end;
  wait_for(dots);
  float sums[kCount][2] = {};  // rows g, g + 8
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float4 w = weights[k];
      if (n < 3) weights[k] = at<float4>(tokens + k, lane.weights + 64 * (n + 1));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* dot = dots + 32 * k + 8 * n + 2 * r;
        // max(x, 0) takes a pipe of half the rate: every second one is the half of x + |x|, which
        // is exact (dots are finite, or NaN).
        float sum = sums[k][r];
        sum = __fmaf_rn(w.x, sm80::max_nan(dot[0], 0.0f), sum);
        sum = __fmaf_rn(w.y, __fadd_rn(dot[1], fabsf(dot[1])), sum);
        sum = __fmaf_rn(w.z, sm80::max_nan(dot[4], 0.0f), sum);
        sum = __fmaf_rn(w.w, __fadd_rn(dot[5], fabsf(dot[5])), sum);
        sums[k][r] = sum;
      }
    }
  }
  // Lanes (0 + 1) + (2 + 3); lane t is left with row g + 8 (t & 1), of token t / 2 where there are
  // two.
  float halves[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    halves[k] =
        (odd ? sums[k][1] : sums[k][0]) + __shfl_xor_sync(~0u, odd ? sums[k][0] : sums[k][1], 1);
  }
  const float mine = upper ? halves[kCount - 1] : halves[0];
  const float other = upper ? halves[0] : halves[kCount - 1];
  const float sum = mine + __shfl_xor_sync(~0u, other, 2);
  if (row < end && (kCount == 2 || !upper)) *logits = __fmul_rn(sum, scale);
}

__device__ __forceinline__ void score_tiles(const IndexLogitsArgs& args, Storage& storage,
                                            Walk walk, const QueryShare& share, int placed) {
  const int warpgroup = uniform(threadIdx.x / 128);
  const Lane lane;
  // Tile `turn` of the CTA's list, counted from 0, is warpgroup turn % kWarpgroups's.
  int32_t stage = warpgroup, turn = warpgroup, begin = 0;
  uint32_t parity = 0;
  NextItem next_item(args, storage, share);
  Item item;
  Part part, next{};
  bool has_next = walk.next(args, storage, item, next);
  for (int k = 0; has_next; ++k) {
    part = next;
    next.count = 0;
    has_next = walk.next(args, storage, item, next);
    const int slot = k % Traits::kSlots;
    if (k >= placed)
      sm90::mbarrier_wait(shared_address(&storage.queries_full[slot]),
                          (k - placed) / Traits::kSlots & 1);
    const int32_t tiles = uniform(part.tile_end - part.tile), count = uniform(part.count);
    const Queries* queries = storage.queries[slot];
    const Token* tokens = storage.tokens[slot];
    float* item_logits =
        args.logits + (part.first + (lane.upper() ? 1 : 0)) * args.logits_stride + lane.row;
    next_item.begin(k + 1, k + 1 >= placed ? next : Part{});
    for (; turn < begin + tiles; turn += Traits::kWarpgroups) {
      next_item.advance();
      sm90::mbarrier_wait(shared_address(&storage.full[stage]), parity);
      const KeyRegisters keys(storage.stages[stage], lane);
      const int32_t entry = (part.tile + turn - begin) * Traits::kTile, row = entry + lane.row;
      float* logits = item_logits + entry;
      const int32_t this_stage = stage;
      stage += Traits::kWarpgroups;
      if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;
      int i = 0;
      const auto release = [&] {
        if (i > 0) return;
        // An arrival alone overtakes loads that wait behind the products' reads of shared memory;
        // the next copy then lands before them. The products have the keys; that the scale has
        // landed, too, is an operand of the arrival (args.nothing is 0). The fence is the
        // fetching warp's: here it costs 600 clocks a tile.
        const uint32_t nothing = __float_as_uint(keys.scale) & args.nothing;
        sm90::mbarrier_arrive(shared_address(&storage.empty[this_stage]) + nothing);
      };
#pragma unroll 1
      for (; i + 1 < count; i += 2, logits += 2 * args.logits_stride)
        score<2>(keys, queries + i, tokens + i, row, logits, lane, release);
      if (i < count) score<1>(keys, queries + i, tokens + i, row, logits, lane, release);
    }
    begin += tiles;
    sm90::mbarrier_arrive(shared_address(&storage.queries_empty[slot]));
    next_item.finish();
  }
}

__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_index_logits_fp8(const __grid_constant__ IndexLogitsArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  auto& storage = *reinterpret_cast<Storage*>(shared);
  // By a warp without tokens in small calls: the first ones are waited for.
  if (threadIdx.x == Traits::kThreads - 32) {
    for (int s = 0; s < Traits::kStages; ++s) {
      sm90::mbarrier_init(shared_address(&storage.full[s]), 1);
      sm90::mbarrier_init(shared_address(&storage.empty[s]), 128);
    }
    for (int s = 0; s < Traits::kSlots; ++s) {
      sm90::mbarrier_init(shared_address(&storage.queries_full[s]), 128 * Traits::kWarpgroups);
      sm90::mbarrier_init(shared_address(&storage.queries_empty[s]), 128 * Traits::kWarpgroups);
    }
    sm90::mbarrier_init(shared_address(&storage.first_full),
                        Traits::kThreads - 32 * Traits::kKeyWarps);
    sm90::fence_proxy_async();
  }
  __syncthreads();
  const int64_t likely = likely_token(args);
  follow_kernels_before();
  touch_queries(args, likely);
  touch_first_row(args);
  const Walk walk = find_part(args, storage);
  if (walk.left == 0) return;

  const QueryShare share(args);
  const int warpgroup = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x % 128 / 32);
  const bool scores = warpgroup < Traits::kWarpgroups;
  int placed = 0;
  if (scores || warp >= Traits::kKeyWarps) {
    Walk first = walk;
    Item item;
    Part part{}, next{};
    first.next(args, storage, item, part);
    // The second item's queries, too, where they are wanted soon.
    if ((part.tile_end - part.tile) * part.count <= Traits::kShortPart)
      first.next(args, storage, item, next);
    if (scores) put_queries(args, storage, share, part, next);
    placed = next.count > 0 ? 2 : 1;
    // As at the other mbarriers every thread arrives: that is what compute-sanitizer can follow,
    // and neither a named barrier nor an arrival of one lane for its warp.
    sm90::mbarrier_arrive(shared_address(&storage.first_full));
    sm90::mbarrier_wait(shared_address(&storage.first_full), 0);
  }
  if (scores) {
    sm90::increase_registers<Traits::kScoreRegisters>();
    score_tiles(args, storage, walk, share, placed);
  } else {
    sm90::decrease_registers<Traits::kFetchRegisters>();
    if (warp < Traits::kKeyWarps) fetch_keys(args, storage, walk, warp);
  }
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
  IndexLogitsArgs args = index_logits_args(params);
  if (context.scratch->measuring() || args.num_tokens == 0 || args.max_end == 0) return;
  const int64_t most = int64_t{args.num_tokens} * ceil_div(args.max_end, kTile);
  const int64_t wanted =
      std::max(std::min(most, Traits::kEnough), ceil_div(most, int64_t{Traits::kWarpgroups}));
  const auto ctas = static_cast<unsigned>(std::min(int64_t{num_multiprocessors()}, wanted));
  // The inverse of 1 does not fit; the share comes out one too small, and that tile is left over.
  args.per_cta =
      static_cast<uint32_t>(std::min((int64_t{1} << 32) / ctas + 1, (int64_t{1} << 32) - 1));
  launch<sm90_index_logits_fp8>({dim3(ctas), Traits::kThreads, sizeof(Storage)},
                                stream_of(context.stream), args);
}

}  // namespace dsv4::nvidia
