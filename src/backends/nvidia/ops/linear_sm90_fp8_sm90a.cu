// sm90_linear_fp8: products of quantised x with FP8 weights on the FP8 tensor cores.
//
// Problem   out[m, n] = sum_b sx[m, b] sw[n / 128, b] sum_{k in block b} x[m, k] W[n, k], both E4M3
// Tiling    kGroups warpgroups x kWaves x 64 tokens (rows of wgmma) by kN rows of W (its columns):
//           rows of an instruction share the scale of W, a thread needs two scales of x. A warp
//           asks the copy engine for 128 columns of both and for the scales of x, and adds the
//           scale of W and, once a tile, which one it is; blocks stride over tiles, tokens fastest
//           within bands. Outputs leave by the copy engine under the next tile's products.
//           Codes of out share a scale by 128 rows of W: few tokens have them in pairs of blocks, a
//           cluster, 64 rows each, which tell each other their largest magnitudes. Up to eight
//           tokens are the columns of instructions there and rows of W their rows (kSwaps): a
//           lane has 4 sums, not 32. With an Fp8Maker every block norms or rotates all of x itself
//           and keeps the codes (up to four tokens)
// Budget    few tokens: bytes of W, x once a tile from L2; a stage of one block of 128 columns
//           takes 230 clocks for 32 rows of W, 430 for 128, of which 170 are not products: narrow
//           tiles have two or four blocks a stage. Many: 128 x 128 x 128 columns are 512 clocks of
//           the tensor cores, 32 KB from L2 = 64 B a clock, five stages of them; 256 x 128: 1024
//           clocks, 47 B a clock, three. 128 FFMA a scheduler and 512 clocks for the promotion,
//           under other products. At 4096 tokens power holds an H200 at 1.45 GHz of 1.98: what
//           counts is work, and idle clocks
// Launch    128 threads that copy + 128 a warpgroup, grid min(tiles, Fp8Batch::most_blocks); may
//           start before the kernel that writes x has ended, and reads W and positions meanwhile
// Contract  sm90_takes() W of FP8; x as Fp8Item says; rows of x beyond `tokens` are not read
// Numerics  linear_sm90_fp8.h. Code NaN of W or x, scale byte 255: NaN
#include <algorithm>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"
#include "backends/nvidia/ops/linear_sm90_fp8_maker-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8_out-inl.h"
#include "backends/nvidia/ops/tensor_map.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

/// Registers of the two roles where two warpgroups multiply: out of 168 a thread.
constexpr int kMultiplyRegisters = 232, kCopyRegisters = 40;
constexpr int kBandTiles = 16;  // of tokens, that blocks go through before the next rows of W

/// kTokensOfTile may be less than the rows that the instructions take: what they read beyond
/// belongs to others, and so do their sums.
/// kPairsOfBlocks: two blocks of a cluster have halves of the rows that share a scale of out.
/// kMakesItsX: all of x is made by the block, stages hold W alone.
template <int kTokensOfTile, int kNOfTile, int kBlocksOfStage, bool kPairsOfBlocks, bool kMakesItsX>
struct Fp8Tile {
  static constexpr int kTokens = kTokensOfTile, kN = kNOfTile;
  /// Of columns in a stage: all of W, then all of x.
  static constexpr int kBlocks = kBlocksOfStage;
  static constexpr bool kPairs = kPairsOfBlocks, kMakesX = kMakesItsX;
  static constexpr bool kMakesCodes = kPairs || kN == kQuantiseGroup;
  /// Few tokens: rows of W are those of the instructions, tokens their columns. The same sums.
  static constexpr bool kSwaps = kTokens == 8;
  static_assert(!kSwaps || (kPairs && kN == 64));
  static constexpr int kSums = kSwaps ? 4 : kN / 2;  ///< of a block of columns, a lane's
  static constexpr int kGroups = kTokens > 64 ? 2 : 1;
  static constexpr int kWaves = kTokens > 128 ? 2 : 1;
  static_assert(kBlocks == 1 || kWaves == 1);
  static_assert(!kPairs || (2 * kN == kQuantiseGroup && kGroups == 1));
  static_assert(!kMakesX || (kFp8MadeTokens <= kTokens && kGroups == 1));
  static constexpr int kWarps = 4 * kGroups;  ///< that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  /// Few tokens read W once, or twice at the same time: what else a step reads, and code, stays in
  /// the L2 then. Elsewhere where no other tile reads it.
  static constexpr bool kReadsWOnce = kTokens <= 64;
  /// The next kernel starts when all of W has been asked for: what it asks for itself would stand
  /// in front. Where tokens are many, memory is not what a product waits for.
  static constexpr bool kStartsNextLate = kTokens <= 64;
  /// Of W, asked for before the kernels before have ended. Pairs follow attention or a small
  /// launch, beside which memory has nothing to do; a block that makes x waits for it once.
  static constexpr int kEarlyStages = kSwaps ? 8 : kPairs || kMakesX ? 4 : 2;
  static constexpr int kWBytes = kN * 128, kXBytes = kMakesX ? 0 : kTokens * 128;
  /// Scales of x lie behind the operands of all stages, which need an alignment of 1024.
  static constexpr int kStageBytes = kBlocks * (kWBytes + kXBytes);
  /// Outputs of 16 tokens on their way out, a wave of a warp (out_unit).
  static constexpr int kStoringWarps = kSwaps ? 1 : kTokens < 64 ? kTokens / 16 : kWarps;
  static constexpr int kOutBytes = 16 * kN * 2;
  static constexpr int kBytesBeyond = kTokens < 64 && !kSwaps ? (64 - kTokens) * 128 : 0;
  static constexpr int kLeft = (226 << 10) - kStoringWarps * kWaves * kOutBytes - kBytesBeyond -
                               static_cast<int>(sizeof(Fp8Made<kMakesX>)) - 2048;
  static constexpr int kMostStages = 32;
  static constexpr int kStages =
      std::min(kMostStages, kLeft / (kStageBytes + kBlocks * kTokens * 4));
  static_assert(kStages >= 3 && kEarlyStages <= kStages);
};

/// A tile: an index of the batch's items, and what of that item.
struct Fp8Work {
  int item, row0, token0, blocks;
};

template <typename Tile>
struct Fp8Shared {
  Fp8Made<Tile::kMakesX> made;  ///< before the ring: instructions read rows beyond it
  alignas(1024) std::byte ring[Tile::kStages][Tile::kStageBytes];
  alignas(1024) std::byte out[Tile::kStoringWarps][Tile::kWaves][Tile::kOutBytes];
  alignas(128) std::byte beyond[Tile::kBytesBeyond + 16];
  alignas(128) float scales[Tile::kStages][Tile::kBlocks * Tile::kTokens];
  float w_scales[Tile::kStages][Tile::kBlocks];
  /// Of a tile, there before the first stage of it. Whoever copies is at most kStages tiles ahead.
  Fp8Work works[Tile::kStages + 1];
  uint64_t full[Tile::kStages], empty[Tile::kStages];
  Fp8Other<!Tile::kPairs ? 0 : Tile::kSwaps ? Tile::kWarps : Tile::kStoringWarps> other;
};

__device__ __forceinline__ int item_of(const Fp8Batch& batch, int tile) {
  int i = 0;
  while (i + 1 < batch.count && tile >= batch.items[i + 1].first_tile) ++i;
  return i;
}
template <typename Tile>
__device__ __forceinline__ Fp8Work find_work(const Fp8Batch& batch, int tile) {
  const int i = item_of(batch, tile);
  const Fp8Item& item = batch.items[i];
  const int token_tiles = (item.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int row_tiles = (item.w.rows + Tile::kN - 1) / Tile::kN;
  int idx = tile - item.first_tile;
  const int band = idx / (kBandTiles * row_tiles);
  idx -= band * kBandTiles * row_tiles;
  const int band_tiles = min(kBandTiles, token_tiles - band * kBandTiles);
  return {.item = i,
          .row0 = idx / band_tiles * Tile::kN,
          .token0 = (band * kBandTiles + idx % band_tiles) * Tile::kTokens,
          .blocks = (item.w.cols + kFp8BlockCols - 1) / kFp8BlockCols};
}

__device__ __forceinline__ float scale_of_byte(uint32_t byte) {
  return __uint_as_float(byte == 255 ? 0x7fc00000u : byte == 0 ? 0x00400000u : byte << 23);
}

/// Scales of W of a tile, block after block, of a warp.
struct WScales {
  const uint8_t* bytes;
  int blocks;
  uint32_t now, next;  ///< of 32 blocks of columns, one a lane
  __device__ __forceinline__ WScales(const LinearWeight& w, const Fp8Work& work)
      : bytes(w.scale + work.row0 / w.block_rows * w.scale_stride),
        blocks(work.blocks),
        now(load(0)),
        next(load(32)) {}
  __device__ __forceinline__ uint32_t load(int block) const {
    return __ldg(bytes + min(block + static_cast<int>(threadIdx.x) % 32, blocks - 1));
  }
  __device__ __forceinline__ float of_block(int block) {
    const float scale = scale_of_byte(__shfl_sync(0xffffffffu, now, block % 32));
    if (block % 32 == 31) {
      now = next;
      next = load(block + 33);
    }
    return scale;
  }
};

/// Asks for a tile's blocks of columns and adds what else a warpgroup must know; a warp calls.
/// `first`: of this block of threads; W does not depend on earlier kernels, so some of it is asked
/// for before they have ended, but not so much that x of the first stage waits behind it.
template <typename Tile, typename Place>
__device__ __forceinline__ void copy_tile(const Fp8Batch& batch, const Fp8Work& work, Fp8Work& to,
                                          bool first, Fp8Shared<Tile>& shared, Place& place) {
  constexpr int kBlocks = Tile::kBlocks;
  const Fp8Item& item = batch.items[work.item];
  const int tile_tokens = batch.tile_tokens, pitch = batch.scale_pitch;
  const uint32_t x_bytes =
      Tile::kMakesX ? 0
                    : static_cast<uint32_t>(tile_tokens) * 128 + static_cast<uint32_t>(pitch) * 4;
  const uint32_t bytes = kBlocks * (Tile::kWBytes + x_bytes);
  const bool once = Tile::kReadsWOnce || item.tokens <= Tile::kTokens;
  const auto copy_w = [&](const auto&... where) {
    once ? sm90::copy_box<true>(where...) : sm90::copy_box(where...);
  };
  const auto ask_for_w = [&](int block, int stage) {
    const uint32_t ring = sm80::shared_address(shared.ring[stage]),
                   full = sm80::shared_address(&shared.full[stage]);
    if constexpr (kBlocks == 1) {
      copy_w(ring, item.w_map, block * 128, work.row0, full);
    } else {
      copy_w(ring, item.w_map, 0, work.row0, block, full);
    }
  };
  const int early = first ? min(Tile::kEarlyStages * kBlocks, work.blocks) : 0;
  if (sm90::elect()) {
    for (int i = 0; i < early; i += kBlocks) ask_for_w(i, i / kBlocks);
  }
  WScales w_scales(item.w, work);
  if (first) sm90::wait_for_kernels_before();
  const float* scale = item.x_scale + work.token0;
  for (int i = 0; i < work.blocks; i += kBlocks) {
    const uint32_t full = sm80::shared_address(&shared.full[place.stage]);
    if (i >= early)
      sm90::mbarrier_wait(sm80::shared_address(&shared.empty[place.stage]), place.phase ^ 1);
    float w_scale[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) w_scale[b] = w_scales.of_block(i + b);
    if (sm90::elect()) {
      if (i >= early) ask_for_w(i, place.stage);
      if constexpr (!Tile::kMakesX) {
        const uint32_t x = sm80::shared_address(shared.ring[place.stage]) + kBlocks * Tile::kWBytes,
                       scales = sm80::shared_address(shared.scales[place.stage]);
        if constexpr (kBlocks == 1) {
          sm90::copy_box(x, item.x_map, i * 128, work.token0, full);
        } else {
          sm90::copy_box(x, item.x_map, 0, work.token0, i, full);
        }
        if (kBlocks > 1 && pitch == item.x_scale_stride) {  // one tile of tokens: in one piece
          sm90::copy_bytes(scales, scale, static_cast<uint32_t>(kBlocks * pitch) * 4, full);
        } else {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            sm90::copy_bytes(scales + b * pitch * 4, scale + b * item.x_scale_stride,
                             static_cast<uint32_t>(pitch) * 4, full);
          }
        }
      }
      if (i == 0) to = work;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) shared.w_scales[place.stage][b] = w_scale[b];
      sm90::mbarrier_arrive_expecting(full, bytes);
    }
    scale += kBlocks * item.x_scale_stride;
    place.advance();
  }
}

/// What a warpgroup knows of its place in the block: nothing of it changes from tile to tile.
struct Fp8Role {
  uint32_t full, empty;           ///< of the first stage
  uint32_t scales, w_scales;      ///< the same; scales: of this lane's first token
  uint64_t w_operand, x_operand;  ///< of the first stage; of this warpgroup's tokens
  uint32_t x_panel, scale_panel;  ///< from a block of a stage to the next: in an operand, in bytes
  int warp, lane;                 ///< of all that multiply

  template <typename Tile>
  __device__ __forceinline__ static Fp8Role of(const Fp8Batch& batch, const Fp8Shared<Tile>& shared,
                                               int warp) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t ring = sm90::uniform(sm80::shared_address(shared.ring));
    uint32_t x = ring + Tile::kBlocks * Tile::kWBytes;
    uint32_t scales = sm90::uniform(sm80::shared_address(shared.scales));
    if constexpr (Tile::kMakesX) {
      x = sm90::uniform(sm80::shared_address(shared.made.codes));
      scales = sm90::uniform(sm80::shared_address(shared.made.scales));
    }
    const int group_token = warp / 4 * Tile::kWaves * 64;
    constexpr int kMadeRows = Fp8Made<true>::kRows;
    return {.full = sm90::uniform(sm80::shared_address(shared.full)),
            .empty = sm90::uniform(sm80::shared_address(shared.empty)),
            .scales = scales + 4 * (Tile::kSwaps ? lane % 4 * 2
                                                 : group_token + lane / 4 +
                                                       (Tile::kMakesX ? 0 : warp % 4 * 16)),
            .w_scales = sm90::uniform(sm80::shared_address(shared.w_scales)),
            .w_operand = sm90::fp8_operand(ring),
            .x_operand = sm90::fp8_operand(x + group_token * 128),
            .x_panel = static_cast<uint32_t>(
                sm90::operand_offset((Tile::kMakesX ? kMadeRows : batch.tile_tokens) * 128)),
            .scale_panel = static_cast<uint32_t>(Tile::kMakesX ? kMadeRows : batch.scale_pitch) * 4,
            .warp = warp,
            .lane = lane};
  }
};

/// Products of all blocks of columns of a stage, `block0` the first of them, each with its own
/// sums, with wave `wave` of this warpgroup's tokens.
template <typename Tile>
__device__ __forceinline__ void start_products(const Fp8Role& role, int stage, int block0, int wave,
                                               float (&sums)[Tile::kBlocks][Tile::kSums]) {
  const uint32_t place = stage * static_cast<uint32_t>(sm90::operand_offset(Tile::kStageBytes));
  const uint32_t x_place = Tile::kMakesX ? block0 * role.x_panel : place;
  sm90::wgmma_fence();
  using Product = sm90::Fp8Product<Tile::kSwaps ? 8 : Tile::kN>;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      const uint64_t x =
          x_place + block * role.x_panel + sm90::operand_offset(wave * (64 * 128) + 32 * k);
      const uint64_t w = place + sm90::operand_offset(block * Tile::kWBytes + 32 * k);
      const uint64_t tokens = sm90::operand_at(role.x_operand, x);
      const uint64_t rows = sm90::operand_at(role.w_operand, w);
      const uint64_t a = Tile::kSwaps ? rows : tokens, b = Tile::kSwaps ? tokens : rows;
      k == 0 ? Product::template run<false>(sums[block], a, b)
             : Product::template run<true>(sums[block], a, b);
    }
  }
  sm90::wgmma_commit();
}

/// Scales of the tokens of rows g and g + 8 of every wave and block of a stage (of the tokens of
/// columns 2 t and 2 t + 1), times those of W.
template <typename Tile>
struct Fp8Scales {
  float2 of[Tile::kBlocks * Tile::kWaves];

  __device__ __forceinline__ void read(const Fp8Role& role, int stage, int block0) {
    const uint32_t from =
        role.scales +
        (Tile::kMakesX ? block0 * role.scale_panel : stage * (Tile::kBlocks * Tile::kTokens * 4));
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * Tile::kWaves; ++i) {
      const int w_at = stage * Tile::kBlocks + i / Tile::kWaves;
      const uint32_t tokens = from + (Tile::kBlocks > 1 ? i * role.scale_panel : i * (64 * 4));
      // Tokens that are made have no others 8 further.
      constexpr uint32_t kNext = Tile::kSwaps ? 4 : Tile::kMakesX ? 0 : 32;
      const float w = __uint_as_float(sm90::load_shared(role.w_scales + w_at * 4));
      of[i] = {__uint_as_float(sm90::load_shared(tokens)) * w,
               __uint_as_float(sm90::load_shared(tokens + kNext)) * w};
    }
  }
};

/// totals += scale * sums, once the products are done.
template <bool kSwaps, int kCount>
__device__ __forceinline__ void promote(float (&totals)[kCount], float (&sums)[kCount],
                                        const float2& scale) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");  // read after the wait only
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool second = kSwaps ? i % 2 != 0 : i % 4 >= 2;
    totals[i] = __fmaf_rn(sums[i], second ? scale.y : scale.x, totals[i]);
  }
}

__device__ __forceinline__ void release_stage(const Fp8Role& role, int stage) {
  __syncwarp();
  if (role.lane == 0) sm90::mbarrier_arrive(role.empty + stage * 8);
}

/// totals of a tile whose first stage has arrived. One wave: the tensor cores work on a block of
/// columns while the sums of the one before are promoted. Two: registers hold the sums of one only;
/// the tensor cores work for the other warpgroup meanwhile, and a step waits for the next stage
/// before it waits for its own products.
template <typename Tile, typename Place>
__device__ __forceinline__ void multiply_tile(int blocks, const Fp8Role& role, Place& place,
                                              float (&totals)[Tile::kWaves][Tile::kSums]) {
#pragma unroll
  for (auto& wave : totals) {
#pragma unroll
    for (float& total : wave) total = 0;
  }
  if constexpr (Tile::kWaves == 1) {
    float even[Tile::kBlocks][Tile::kSums], odd[Tile::kBlocks][Tile::kSums];
    Fp8Scales<Tile> before{}, now{};
    int stage_before = 0, block = 0;
    const auto start = [&](float(&sums)[Tile::kBlocks][Tile::kSums]) {
      sm90::mbarrier_wait(role.full + place.stage * 8, place.phase);
      now.read(role, place.stage, block);
      start_products<Tile>(role, place.stage, block, 0, sums);
    };
    const auto finish = [&](float(&sums)[Tile::kBlocks][Tile::kSums]) {
      release_stage(role, stage_before);
#pragma unroll
      for (int i = 0; i < Tile::kBlocks; ++i)
        promote<Tile::kSwaps>(totals[0], sums[i], before.of[i]);
    };
    const auto step_on = [&] {
      before = now;
      stage_before = place.stage;
      place.advance();
      block += Tile::kBlocks;
    };
    start(even);
    step_on();
    const int stages = blocks / Tile::kBlocks;
    for (int i = 1;; ++i) {
      if (i == stages) {
        sm90::wgmma_wait<0>();
        finish(even);
        break;
      }
      start(odd);
      sm90::wgmma_wait<1>();
      finish(even);
      step_on();
      if (++i == stages) {
        sm90::wgmma_wait<0>();
        finish(odd);
        break;
      }
      start(even);
      sm90::wgmma_wait<1>();
      finish(odd);
      step_on();
    }
  } else {
    Fp8Scales<Tile> next;
    next.read(role, place.stage, 0);
    for (int block = 0; block < blocks; ++block) {
      const Fp8Scales<Tile> scales = next;
      const int stage = place.stage;
      place.advance();
#pragma unroll
      for (int wave = 0; wave < Tile::kWaves; ++wave) {
        const bool last = wave + 1 == Tile::kWaves;
        float sums[Tile::kBlocks][Tile::kSums];
        start_products<Tile>(role, stage, block, wave, sums);
        if (last && block + 1 < blocks) {
          sm90::mbarrier_wait(role.full + place.stage * 8, place.phase);
          next.read(role, place.stage, block + 1);
        }
        sm90::wgmma_wait<0>();
        if (last) release_stage(role, stage);
        promote<false>(totals[wave], sums[0], scales.of[wave]);
      }
    }
  }
}

/// A warp's outputs of a wave.
template <typename Tile>
__device__ __forceinline__ void store_wave(const Fp8Item& item, const Fp8Work& work,
                                           const Fp8Role& role, int wave, Fp8Shared<Tile>& shared,
                                           const float (&totals)[Tile::kN / 2], int& turn) {
  int lane = role.lane;
  asm volatile("" : "+r"(lane));  // addresses are not worth registers while products are under way
  const int token0 = work.token0 + (role.warp / 4 * Tile::kWaves + wave) * 64 + role.warp % 4 * 16;
  if (token0 >= item.tokens || token0 >= work.token0 + Tile::kTokens) return;
  if (item.out_f32) {
#pragma unroll
    for (int j = 0; j < Tile::kN / 8; ++j) {
      const int row = work.row0 + 8 * j + 2 * (lane % 4);
      store_pair(item, token0 + lane / 4, row, totals[4 * j], totals[4 * j + 1]);
      store_pair(item, token0 + lane / 4 + 8, row, totals[4 * j + 2], totals[4 * j + 3]);
    }
    return;
  }
  const uint32_t staging = sm80::shared_address(shared.out[role.warp][wave]);
  if constexpr (Tile::kMakesCodes) {
    if (item.out_scale != nullptr) {
      if constexpr (Tile::kPairs) {
        make_codes<Tile>(
            item, token0, work.row0, lane, totals,
            [&](uint2 own) { return shared.other.larger(role.warp, lane, turn, own); },
            [&, to = static_cast<uint8_t*>(item.out) + token0 * item.out_stride + work.row0,
             stride = item.out_stride,
             tokens = item.tokens - token0](int token, int row, uint32_t codes) {
              if (token < tokens) *reinterpret_cast<uint32_t*>(to + token * stride + row) = codes;
            });
        ++turn;
      } else {
        make_codes<Tile>(
            item, token0, work.row0, lane, totals, [](uint2 own) { return own; },
            [&](int token, int row, uint32_t codes) {
              sm90::store_shared(out_unit<Tile>(staging, token, row / 16) + row % 16, codes);
            });
        sm90::fence_proxy_async();
        __syncwarp();
        if (lane == 0) sm90::store_box(item.out_map, work.row0, token0, staging);
      }
      return;
    }
  }
  stage_values<Tile>(lane, staging, totals);
  if (!item.out_mapped) return copy_staged<Tile>(item, token0, work.row0, lane, staging);
  sm90::fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kN / 64; ++panel) {
      sm90::store_box(item.out_map, work.row0 * 2 + panel * 128, token0,
                      staging + panel * (16 * 128));
    }
  }
}

/// Codes of a tile whose tokens are columns: through shared memory to a warp a token, two rows a
/// lane. All warps call.
template <typename Tile>
__device__ __forceinline__ void store_codes_of_columns(const Fp8Item& item, const Fp8Work& work,
                                                       const Fp8Role& role, Fp8Shared<Tile>& shared,
                                                       const float (&totals)[4], int& turn) {
  constexpr int kBarrier = 2;
  const int lane = role.lane, warp = role.warp;
  auto* values = reinterpret_cast<uint16_t*>(shared.out[0][0]);  // [token][row], in bf16
  sm90::barrier_sync(kBarrier, Tile::kThreads - 128);            // of the tile before
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t pair = sm80::pack_bf16x2(totals[2 * half], totals[2 * half + 1]);
    uint16_t* to = values + lane % 4 * 2 * Tile::kN + warp * 16 + lane / 4 + 8 * half;
    to[0] = static_cast<uint16_t>(pair);
    to[Tile::kN] = static_cast<uint16_t>(pair >> 16);
  }
  sm90::barrier_sync(kBarrier, Tile::kThreads - 128);
  const int tokens = item.tokens - work.token0;
  if (warp >= tokens) return;
  const auto* rows = reinterpret_cast<const uint32_t*>(values) + lane;
  const uint32_t pairs[2] = {rows[warp * (Tile::kN / 2)], rows[(warp + 4) * (Tile::kN / 2)]};
  uint32_t own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) own[i] = __reduce_max_sync(~0u, larger_magnitude(pairs[i]));
  const uint2 largest = shared.other.larger(warp, lane, turn, {own[0], own[1]});
  ++turn;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = warp + 4 * i;
    if (token >= tokens) break;
    const GroupScale scale = group_scale(i == 0 ? largest.x : largest.y, kQuantiseFloor);
    auto* to = static_cast<uint8_t*>(item.out) + (work.token0 + token) * item.out_stride;
    reinterpret_cast<uint16_t*>(to + work.row0)[lane] =
        static_cast<uint16_t>(scale.codes(pairs[i]));
    if (lane == 0 && work.row0 % kQuantiseGroup == 0) {
      item.out_scale[work.row0 / kQuantiseGroup * item.out_scale_stride + work.token0 + token] =
          scale.value();
    }
  }
}

/// A warp's outputs of a tile.
template <typename Tile>
__device__ __forceinline__ void store_tile(const Fp8Item& item, const Fp8Work& work,
                                           const Fp8Role& role, Fp8Shared<Tile>& shared,
                                           const float (&totals)[Tile::kWaves][Tile::kSums],
                                           int& turn) {
  if constexpr (Tile::kSwaps) {
    store_codes_of_columns<Tile>(item, work, role, shared, totals[0], turn);
  } else {
    if (role.warp >= Tile::kStoringWarps) return;
    sm90::store_wait_read();  // of the tile before
    __syncwarp();
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave)
      store_wave<Tile>(item, work, role, wave, shared, totals[wave], turn);
    sm90::store_commit();
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    sm90_linear_fp8(const __grid_constant__ Fp8Batch batch, int tiles) {
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Fp8Shared<Tile>*>(raw);
  if constexpr (!Tile::kStartsNextLate) sm90::start_next_kernel();  // it waits for this one's end
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      sm90::mbarrier_init(sm80::shared_address(&shared.full[s]), 1);
      sm90::mbarrier_init(sm80::shared_address(&shared.empty[s]), Tile::kWarps);
    }
    if constexpr (Tile::kPairs) shared.other.init();
    if constexpr (Tile::kMakesX) sm90::mbarrier_init(sm80::shared_address(&shared.made.landed), 1);
    sm90::fence_barrier_init();
  }
  if constexpr (Tile::kPairs) {
    sm90::cluster_arrive();
    sm90::cluster_wait();
  } else {
    __syncthreads();
  }
  const auto first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  sm90::RingPlace<Tile::kStages> place;
  sm90::RingPlace<Tile::kStages + 1> work_place;
  const auto warp = static_cast<int>(sm90::uniform(threadIdx.x / 32));
  if (warp >= Tile::kWarps) {
    if constexpr (Tile::kGroups == 2) sm90::decrease_registers<kCopyRegisters>();
    if (warp == Tile::kWarps) {
      for (int tile = first; tile < tiles; tile += step) {
        const Fp8Work work = find_work<Tile>(batch, tile);
        copy_tile<Tile>(batch, work, shared.works[work_place.stage], tile == first, shared, place);
        work_place.advance();
      }
      if constexpr (Tile::kStartsNextLate) sm90::start_next_kernel();
    }
    return;
  }
  if constexpr (Tile::kGroups == 2) sm90::increase_registers<kMultiplyRegisters>();
  const Fp8Role role = Fp8Role::of(batch, shared, warp);
  int turn = 0;                // of what the two blocks of a pair tell each other
  const void* made = nullptr;  // the x of which there are codes
  int made_count = 0;
  for (int tile = first; tile < tiles; tile += step) {
    if constexpr (Tile::kMakesX) {
      const Fp8Item& item = batch.items[item_of(batch, tile)];
      if (item.x != made) {
        Fp8RowMaker(item, warp, shared.made).run(made_count++);
        made = item.x;
      }
    }
    sm90::mbarrier_wait(role.full + place.stage * 8, place.phase);
    const Fp8Work& given = shared.works[work_place.stage];
    const Fp8Work work{.item = sm90::uniform(given.item),
                       .row0 = sm90::uniform(given.row0),
                       .token0 = sm90::uniform(given.token0),
                       .blocks = sm90::uniform(given.blocks)};
    work_place.advance();
    float totals[Tile::kWaves][Tile::kSums];
    multiply_tile<Tile>(work.blocks, role, place, totals);
    store_tile<Tile>(batch.items[work.item], work, role, shared, totals, turn);
  }
  sm90::store_wait_read();
}

/// Whether the copy engine can write the outputs, in boxes of 128 bytes.
bool maps_out(const Fp8Item& item, int n) {
  const int64_t row_bytes = item.out_stride * (item.out_scale == nullptr ? 2 : 1);
  return !item.out_f32 && n >= 64 && row_bytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(item.out) % 16 == 0;
}

template <int kTokens, int kN, int kBlocks, bool kPairs, bool kMakesX>
void launch_tiles(Fp8Batch& batch, int64_t most_tokens, cudaStream_t stream) {
  using Tile = Fp8Tile<kTokens, kN, kBlocks, kPairs, kMakesX>;
  constexpr int kBytes = static_cast<int>(sizeof(Fp8Shared<Tile>));
  static_assert(kBytes <= 227 << 10);
  batch.tile_tokens = static_cast<int32_t>(std::min<int64_t>(kTokens, round_up(most_tokens, 8)));
  batch.scale_pitch = kBlocks > 1 && batch.items[0].x_scale_stride <= kTokens
                          ? static_cast<int32_t>(batch.items[0].x_scale_stride)
                          : batch.tile_tokens;
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    Fp8Item& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, kN) * ceil_div(item.tokens, kTokens);
    item.out_mapped = maps_out(item, kN) && !(kPairs && item.out_scale != nullptr);
    if (item.out_mapped) {
      const int64_t elem_bytes = item.out_scale == nullptr ? 2 : 1;
      item.out_map = byte_map(item.out, item.out_stride * elem_bytes, item.tokens,
                              item.w.rows * elem_bytes, 16, true);
    }
    if (kBlocks == 1) {
      item.w_map = byte_map(item.w.data, item.w.row_bytes, item.w.rows, item.w.cols, kN, true);
      if (!kMakesX) {
        item.x_map = byte_map(item.x, item.x_stride, item.tokens,
                              round_up(item.w.cols, kFp8BlockCols), batch.tile_tokens, true);
      }
    } else {
      const int64_t blocks = item.w.cols / kFp8BlockCols;
      item.w_map = byte_map_3d(item.w.data, item.w.row_bytes, kFp8BlockCols, blocks, item.w.rows,
                               kFp8BlockCols, kN, kBlocks);
      if (!kMakesX) {
        item.x_map = byte_map_3d(item.x, item.x_stride, kFp8BlockCols, blocks, item.tokens,
                                 kFp8BlockCols, batch.tile_tokens, kBlocks);
      }
    }
  }
  constexpr unsigned kCluster = kPairs ? 2 : 1;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, batch.most_blocks));
  launch<sm90_linear_fp8<Tile>>(
      {dim3(blocks / kCluster * kCluster), Tile::kThreads, kBytes, kCluster}, stream, batch,
      static_cast<int>(tiles));
}

struct Fp8TileChoice {
  int tokens, n, blocks;
  bool pairs, makes_codes, makes_x;
  void (*launch)(Fp8Batch&, int64_t most_tokens, cudaStream_t);
};
template <int kTokens, int kN, int kBlocks = 1, bool kPairs = false, bool kMakesX = false>
constexpr Fp8TileChoice choice() {
  return {kTokens,
          kN,
          kBlocks,
          kPairs,
          Fp8Tile<kTokens, kN, kBlocks, kPairs, kMakesX>::kMakesCodes,
          kMakesX,
          launch_tiles<kTokens, kN, kBlocks, kPairs, kMakesX>};
}
/// The first of the cheapest is taken.
constexpr Fp8TileChoice kTiles[] = {choice<16, 32, 4>(),
                                    choice<16, 64, 2>(),
                                    choice<8, 64, 2, true>(),
                                    choice<16, 64, 2, true>(),
                                    choice<16, 128>(),
                                    choice<64, 32, 4>(),
                                    choice<64, 64, 2>(),
                                    choice<64, 64, 2, true>(),
                                    choice<64, 128>(),
                                    choice<128, 128>(),
                                    choice<128, 64>(),
                                    choice<128, 32>(),
                                    choice<256, 128>(),
                                    choice<16, 32, 4, false, true>(),
                                    choice<16, 64, 2, false, true>(),
                                    choice<8, 64, 2, true, true>(),
                                    choice<16, 128, 1, false, true>()};

/// Clocks for 128 columns of everything, about, as measured: W from memory, operands from L2, or
/// the tiles of a multiprocessor one after the other; the ends of these tiles; tokens that are
/// none.
int64_t cost(const Fp8Batch& batch, const Fp8TileChoice& tile) {
  int64_t tiles = 0, rows = 0, most_tokens = 0, steps = 1;
  for (int i = 0; i < batch.count; ++i) {
    const Fp8Item& item = batch.items[i];
    tiles += ceil_div(item.w.rows, tile.n) * ceil_div(item.tokens, tile.tokens);
    rows += item.w.rows;
    most_tokens = std::max<int64_t>(most_tokens, item.tokens);
    steps = std::max(steps, ceil_div(item.w.cols, kFp8BlockCols));
  }
  const int64_t box = std::min<int64_t>(tile.tokens, most_tokens);
  const int64_t tensor = int64_t{std::max(64, tile.tokens)} * tile.n / 32;
  const int64_t step = tile.tokens > 128
                           ? tensor * 11 / 8
                           : std::max(tensor * 5 / 4, 170 / tile.blocks + 2 * tile.n + box * 4 / 5);
  const int64_t multiprocessors = num_multiprocessors();
  const int64_t waves = ceil_div(tiles, multiprocessors);
  // Bytes a clock: a multiprocessor takes 29 of W, memory gives 1850, L2 7000.
  const int64_t memory = std::min<int64_t>(1850, 29 * std::min(tiles, multiprocessors));
  constexpr int64_t kL2 = 7000, kTileEnd = 1600;
  const int64_t token_tiles = ceil_div(most_tokens, tile.tokens);
  return std::max({rows * 128 / memory, tiles * (tile.n + box) * 128 / kL2, waves * step}) +
         waves * kTileEnd / steps + 16 * token_tiles +
         (token_tiles * tile.tokens - most_tokens) / 16;
}

/// Whether K is whole stages of that many blocks of columns, codes of out can be made, and pairs of
/// tiles share scales: all of a pair are of one item and the same tokens.
bool takes(const Fp8Batch& batch, const Fp8TileChoice& tile) {
  for (int i = 0; i < batch.count; ++i) {
    const Fp8Item& item = batch.items[i];
    if (tile.makes_x != item.maker.makes()) return false;
    if (item.w.cols % (tile.blocks * kFp8BlockCols) != 0 && tile.blocks > 1) return false;
    if (item.out_scale != nullptr && !tile.makes_codes) return false;
    if (tile.pairs && (item.out_scale == nullptr || item.w.rows % kQuantiseGroup != 0 ||
                       item.tokens > tile.tokens))
      return false;
  }
  return true;
}

}  // namespace

void launch_linear_sm90_fp8(Fp8Batch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  int64_t most_tokens = 0;
  for (int i = 0; i < batch.count; ++i)
    most_tokens = std::max<int64_t>(most_tokens, batch.items[i].tokens);
  const Fp8TileChoice* best = nullptr;
  int64_t fewest_clocks = 0;
  for (const Fp8TileChoice& tile : kTiles) {
    if (!takes(batch, tile)) continue;
    const int64_t clocks = cost(batch, tile);
    if (best != nullptr && clocks >= fewest_clocks) continue;
    best = &tile;
    fewest_clocks = clocks;
  }
  best->launch(batch, most_tokens, stream);
}

}  // namespace dsv4::nvidia
