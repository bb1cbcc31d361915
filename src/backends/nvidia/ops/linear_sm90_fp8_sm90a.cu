// sm90_linear_fp8: products of quantised x with FP8 weights on the FP8 tensor cores.
//
// Problem   out[m, n] = sum_b sx[m, b] sw[n / 128, b] sum_{k in block b} x[m, k] W[n, k], both E4M3
// Tiling    kGroups warpgroups x kWaves x 64 tokens (rows of wgmma) by kN rows of W (its columns):
//           rows of an instruction share the scale of W, a thread needs two scales of x. A thread
//           asks the copy engine for 128 columns of both and for the scales of x; blocks stride
//           over tiles, tokens fastest within bands
// Budget    few tokens: bytes of W, 12 B a clock and multiprocessor of an H100, 17 of an H200; x
//           once a tile from L2; a step of 128 columns takes 350 clocks at least, a chain of
//           instructions. Many: 256 x 128 x 128 columns: 1024 clocks of the tensor cores, 48 KB
//           from L2 = 47 B a clock; 128 FFMA a scheduler for the promotion, under the other
//           warpgroup's products
// Launch    128 threads that copy + 128 a warpgroup, grid min(tiles, SMs); may start before the
//           kernel that prepares x has ended, and reads W meanwhile
// Contract  sm90_takes() W of FP8; x as Fp8Item says; rows of x beyond `tokens` are not read
// Numerics  linear_sm90_fp8.h. Code NaN of W or x, scale byte 255: NaN
#include <algorithm>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"
#include "backends/nvidia/ops/tensor_map.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

/// Registers of the two roles where two warpgroups multiply: out of 168 a thread.
constexpr int kMultiplyRegisters = 232, kCopyRegisters = 40;
constexpr int kBandTiles = 16;  // of tokens, that blocks go through before the next rows of W

/// kTokensOfTile may be less than the rows that the instructions take: what they read beyond
/// belongs to others, and so do their sums.
template <int kTokensOfTile, int kNOfTile>
struct Fp8Tile {
  static constexpr int kTokens = kTokensOfTile, kN = kNOfTile;
  static constexpr int kGroups = kTokens > 64 ? 2 : 1;
  static constexpr int kWaves = kTokens > 128 ? 2 : 1;
  static constexpr int kWarps = 4 * kGroups;  ///< that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kWBytes = kN * 128, kXBytes = kTokens * 128;
  /// Scales of x lie behind the operands of all stages, which need an alignment of 1024.
  static constexpr int kStageBytes = kWBytes + kXBytes;
  /// Outputs of 16 tokens on their way out, a warp; 16 bytes more a row spread the banks.
  static constexpr int kOutCols = kN < 64 ? kN : 64;
  static constexpr int kOutStride = kOutCols * 2 + 16;
  static constexpr int kOutBytes = 16 * kOutStride;
  static constexpr int kBytesBeyond = kTokens < 64 ? (64 - kTokens) * 128 : 0;
  static constexpr int kLeft = (226 << 10) - kWarps * kOutBytes - kBytesBeyond - 2048;
  static constexpr int kMostStages = 32;
  static constexpr int kStages = std::min(kMostStages, kLeft / (kStageBytes + kTokens * 4));
  static_assert(kStages >= 3);
};

template <typename Tile>
struct Fp8Shared {
  alignas(1024) std::byte ring[Tile::kStages][Tile::kStageBytes];
  alignas(128) std::byte beyond[Tile::kBytesBeyond + 16];
  alignas(128) float scales[Tile::kStages][Tile::kTokens];
  alignas(16) std::byte out[Tile::kWarps][Tile::kOutBytes];
  uint64_t full[Tile::kStages], empty[Tile::kStages];
};

struct Fp8Work {
  const Fp8Item* item;
  int row0, token0, blocks;
};

template <typename Tile>
__device__ __forceinline__ Fp8Work find_work(const Fp8Batch& batch, int tile) {
  int i = 0;
  while (i + 1 < batch.count && tile >= batch.items[i + 1].first_tile) ++i;
  const Fp8Item& item = batch.items[i];
  const int token_tiles = (item.tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int row_tiles = (item.w.rows + Tile::kN - 1) / Tile::kN;
  int idx = tile - item.first_tile;
  const int band = idx / (kBandTiles * row_tiles);
  idx -= band * kBandTiles * row_tiles;
  const int band_tiles = min(kBandTiles, token_tiles - band * kBandTiles);
  return {.item = &item,
          .row0 = idx / band_tiles * Tile::kN,
          .token0 = (band * kBandTiles + idx % band_tiles) * Tile::kTokens,
          .blocks = (item.w.cols + kFp8BlockCols - 1) / kFp8BlockCols};
}

/// Asks for a tile's blocks of columns; one thread
/// calls. `first`: of this block of threads; W does not depend on earlier kernels, so as much of it
/// as fits is asked for before they have ended.
template <typename Tile, typename Place>
__device__ __forceinline__ void copy_tile(const Fp8Work& work, int tile_tokens, bool first,
                                          Fp8Shared<Tile>& shared, Place& place) {
  const Fp8Item& item = *work.item;
  const uint32_t bytes = Tile::kWBytes + static_cast<uint32_t>(tile_tokens) * (128 + 4);
  const auto ask_for_w = [&](int block, int stage) {
    const uint32_t full = sm80::shared_address(&shared.full[stage]);
    sm90::mbarrier_arrive_expecting(full, bytes);
    sm90::copy_box(sm80::shared_address(shared.ring[stage]), item.w_map, block * 128, work.row0,
                   full);
  };
  const int early = first ? min(Tile::kStages, work.blocks) : 0;
  for (int i = 0; i < early; ++i) ask_for_w(i, i);
  if (first) sm90::wait_for_kernels_before();
  const float* scale = item.x_scale + work.token0;
  for (int i = 0; i < work.blocks; ++i) {
    if (i >= early) {
      sm90::mbarrier_wait(sm80::shared_address(&shared.empty[place.stage]), place.phase ^ 1);
      ask_for_w(i, place.stage);
    }
    const uint32_t full = sm80::shared_address(&shared.full[place.stage]);
    sm90::copy_box(sm80::shared_address(shared.ring[place.stage]) + Tile::kWBytes, item.x_map,
                   i * 128, work.token0, full);
    sm90::copy_bulk(sm80::shared_address(shared.scales[place.stage]),
                    scale + i * item.x_scale_stride, static_cast<uint32_t>(tile_tokens) * 4, full);
    place.advance();
  }
}

/// Scale bytes of 32 blocks of columns from `block`, one a lane.
__device__ __forceinline__ uint32_t load_scale_bytes(const Fp8Work& work, int block) {
  const LinearWeight& w = work.item->w;
  const int own = min(block + static_cast<int>(threadIdx.x) % 32, work.blocks - 1);
  return __ldg(w.scale + work.row0 / w.block_rows * w.scale_stride + own);
}
__device__ __forceinline__ float scale_of_byte(uint32_t byte) {
  return __uint_as_float(byte == 255 ? 0x7fc00000u : byte == 0 ? 0x00400000u : byte << 23);
}

/// What a warpgroup knows of its place in the block: nothing of it changes from tile to tile.
template <typename Tile>
struct Fp8Role {
  uint32_t ring, scales, full, empty;
  int warp, lane;  ///< of all that multiply
};

/// Products of one block of columns with wave `wave` of this warpgroup's tokens.
template <typename Tile>
__device__ __forceinline__ void start_products(const Fp8Role<Tile>& role, int stage, int wave,
                                               float (&sums)[Tile::kN / 2]) {
  const uint32_t w = role.ring + stage * Tile::kStageBytes;
  const uint64_t b = sm90::fp8_operand(w);
  const uint64_t a =
      sm90::fp8_operand(w + Tile::kWBytes + (role.warp / 4 * Tile::kWaves + wave) * (64 * 128));
  sm90::wgmma_fence();
  using Product = sm90::Fp8Product<Tile::kN>;
  Product::template run<false>(sums, a, b);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    Product::template run<true>(sums, a + sm90::operand_offset(32 * k),
                                b + sm90::operand_offset(32 * k));
  }
  sm90::wgmma_commit();
}

/// Scales of the tokens of rows g and g + 8 of a wave.
template <typename Tile>
__device__ __forceinline__ float2 read_scales(const Fp8Role<Tile>& role, int stage, int wave) {
  const int token = (role.warp / 4 * Tile::kWaves + wave) * 64 + role.warp % 4 * 16 + role.lane / 4;
  const uint32_t from = role.scales + (stage * Tile::kTokens + token) * 4;
  return {__uint_as_float(sm90::load_shared(from)), __uint_as_float(sm90::load_shared(from + 32))};
}

/// totals += scale * sums, once the products are done.
template <int kCount>
__device__ __forceinline__ void promote(float (&totals)[kCount], float (&sums)[kCount],
                                        const float2& x_scale, float w_scale) {
  const float low = x_scale.x * w_scale, high = x_scale.y * w_scale;
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");  // read after the wait only
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    totals[i] = __fmaf_rn(sums[i], low, totals[i]);
    totals[i + 1] = __fmaf_rn(sums[i + 1], low, totals[i + 1]);
    totals[i + 2] = __fmaf_rn(sums[i + 2], high, totals[i + 2]);
    totals[i + 3] = __fmaf_rn(sums[i + 3], high, totals[i + 3]);
  }
}

template <typename Tile>
__device__ __forceinline__ void release_stage(const Fp8Role<Tile>& role, int stage) {
  __syncwarp();
  if (role.lane == 0) sm90::mbarrier_arrive(role.empty + stage * 8);
}

/// Scales of W of a tile, block after block. Asked for a tile ahead: they come from far away.
struct WScales {
  uint32_t now, next;
  __device__ __forceinline__ explicit WScales(const Fp8Work& work)
      : now(load_scale_bytes(work, 0)), next(load_scale_bytes(work, 32)) {}
  __device__ __forceinline__ float of_block(const Fp8Work& work, int block) {
    const float scale = scale_of_byte(__shfl_sync(0xffffffffu, now, block % 32));
    if (block % 32 == 31) {
      now = next;
      next = load_scale_bytes(work, block + 33);
    }
    return scale;
  }
};

/// totals of a tile. One wave: the tensor cores work on a block of columns while the sums of the
/// one before are promoted. Two: registers hold the sums of one only; the tensor cores work for the
/// other warpgroup meanwhile.
template <typename Tile, typename Place>
__device__ __forceinline__ void multiply_tile(const Fp8Work& work, WScales& w_scales,
                                              const Fp8Role<Tile>& role, Place& place,
                                              float (&totals)[Tile::kWaves][Tile::kN / 2]) {
#pragma unroll
  for (auto& wave : totals) {
#pragma unroll
    for (float& total : wave) total = 0;
  }
  if constexpr (Tile::kWaves == 1) {
    float even[Tile::kN / 2], odd[Tile::kN / 2];
    float2 before{}, now{};
    int stage_before = 0;
    const auto start = [&](float(&sums)[Tile::kN / 2]) {
      sm90::mbarrier_wait(role.full + place.stage * 8, place.phase);
      now = read_scales(role, place.stage, 0);
      start_products(role, place.stage, 0, sums);
    };
    const auto finish = [&](float(&sums)[Tile::kN / 2], int block) {
      release_stage(role, stage_before);
      promote(totals[0], sums, before, w_scales.of_block(work, block));
    };
    const auto step_on = [&] {
      before = now;
      stage_before = place.stage;
      place.advance();
    };
    start(even);
    step_on();
    int block = 1;
    for (; block + 1 < work.blocks; block += 2) {
      start(odd);
      sm90::wgmma_wait<1>();
      finish(even, block - 1);
      step_on();
      start(even);
      sm90::wgmma_wait<1>();
      finish(odd, block);
      step_on();
    }
    if (block < work.blocks) {
      start(odd);
      sm90::wgmma_wait<1>();
      finish(even, block - 1);
      step_on();
      sm90::wgmma_wait<0>();
      finish(odd, block);
    } else {
      sm90::wgmma_wait<0>();
      finish(even, block - 1);
    }
  } else {
    for (int block = 0; block < work.blocks; ++block) {
      sm90::mbarrier_wait(role.full + place.stage * 8, place.phase);
      float w_scale = 0;
#pragma unroll
      for (int wave = 0; wave < Tile::kWaves; ++wave) {
        float sums[Tile::kN / 2];
        const float2 x_scale = read_scales(role, place.stage, wave);
        start_products(role, place.stage, wave, sums);
        if (wave == 0) w_scale = w_scales.of_block(work, block);
        sm90::wgmma_wait<0>();
        if (wave + 1 == Tile::kWaves) release_stage(role, place.stage);
        promote(totals[wave], sums, x_scale, w_scale);
      }
      place.advance();
    }
  }
}

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

/// Codes of a token's values in bf16 and their scale, where the tile holds whole groups of 128.
template <typename Tile>
__device__ __forceinline__ void store_codes_of_wave(const Fp8Item& item, int token0, int row0,
                                                    int lane, uint32_t staging,
                                                    const float (&totals)[Tile::kN / 2]) {
  static_assert(Tile::kN == kQuantiseGroup && Tile::kOutStride >= kQuantiseGroup + 16);
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
    const uint32_t to = staging + token * Tile::kOutStride + (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      const uint32_t first = scale.codes(pairs[j]), second = scale.codes(pairs[j + 1]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      sm90::store_shared(to + 8 * j, odd ? other | second << 16 : first | other << 16);
    }
  }
  __syncwarp();
  constexpr int kPieces = kQuantiseGroup / 16;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int idx = i * 32 + lane, token = idx / kPieces, piece = idx % kPieces;
    if (token0 + token >= item.tokens) continue;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(item.out) + (token0 + token) * item.out_stride +
                              row0 + piece * 16) =
        sm80::load_shared_16(staging + token * Tile::kOutStride + piece * 16);
  }
  __syncwarp();
}

template <typename Tile>
__device__ __forceinline__ void store_wave(const Fp8Work& work, const Fp8Role<Tile>& role, int wave,
                                           std::byte* staging,
                                           const float (&totals)[Tile::kN / 2]) {
  const Fp8Item& item = *work.item;
  const int lane = role.lane;
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
  const uint32_t to = sm80::shared_address(staging);
  if constexpr (Tile::kN == kQuantiseGroup) {
    if (item.out_scale != nullptr)
      return store_codes_of_wave<Tile>(item, token0, work.row0, lane, to, totals);
  }
  // Lane 8 i + j gives row j of matrix i: tokens 0..7 and 8..15 of 8 columns, then of the next 8.
  const uint32_t matrix_row =
      to + (lane % 8 + lane / 8 % 2 * 8) * Tile::kOutStride + lane / 16 * 16;
#pragma unroll
  for (int part = 0; part < Tile::kN / Tile::kOutCols; ++part) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kOutCols / 16; ++j) {
      const float* sums = totals + part * (Tile::kOutCols / 2) + 8 * j;
      sm90::store_matrix_4(matrix_row + j * 32, sm80::pack_bf16x2(sums[0], sums[1]),
                           sm80::pack_bf16x2(sums[2], sums[3]), sm80::pack_bf16x2(sums[4], sums[5]),
                           sm80::pack_bf16x2(sums[6], sums[7]));
    }
    __syncwarp();
    constexpr int kPieces = Tile::kOutCols / 8;
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int idx = i * 32 + lane, token = idx / kPieces, piece = idx % kPieces;
      store_eight(item, token0 + token, work.row0 + part * Tile::kOutCols + piece * 8,
                  sm80::load_shared_16(to + token * Tile::kOutStride + piece * 16));
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    sm90_linear_fp8(const __grid_constant__ Fp8Batch batch, int tiles) {
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Fp8Shared<Tile>*>(raw);
  sm90::start_next_kernel();  // it waits for this one's end before it reads
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      sm90::mbarrier_init(sm80::shared_address(&shared.full[s]), 1);
      sm90::mbarrier_init(sm80::shared_address(&shared.empty[s]), Tile::kWarps);
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();
  const auto first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  sm90::RingPlace<Tile::kStages> place;
  if (threadIdx.x >= Tile::kWarps * 32) {
    if constexpr (Tile::kGroups == 2) sm90::decrease_registers<kCopyRegisters>();
    if (threadIdx.x == Tile::kWarps * 32) {
      for (int tile = first; tile < tiles; tile += step) {
        copy_tile<Tile>(find_work<Tile>(batch, tile), batch.tile_tokens, tile == first, shared,
                        place);
      }
    }
    return;
  }
  if constexpr (Tile::kGroups == 2) sm90::increase_registers<kMultiplyRegisters>();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const Fp8Role<Tile> role{.ring = sm80::shared_address(shared.ring),
                           .scales = sm80::shared_address(shared.scales),
                           .full = sm80::shared_address(shared.full),
                           .empty = sm80::shared_address(shared.empty),
                           .warp = warp,
                           .lane = static_cast<int>(threadIdx.x) % 32};
  Fp8Work work = find_work<Tile>(batch, first);
  WScales w_scales(work);
  for (int tile = first; tile < tiles; tile += step) {
    float totals[Tile::kWaves][Tile::kN / 2];
    multiply_tile<Tile>(work, w_scales, role, place, totals);
    // The kernel would not end before loads that nobody needs.
    const Fp8Work next = tile + step < tiles ? find_work<Tile>(batch, tile + step) : work;
    if (tile + step < tiles) w_scales = WScales(next);
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave)
      store_wave<Tile>(work, role, wave, shared.out[warp], totals[wave]);
    work = next;
  }
}

template <int kTokens, int kN>
void launch_tiles(Fp8Batch& batch, int64_t most_tokens, cudaStream_t stream) {
  using Tile = Fp8Tile<kTokens, kN>;
  constexpr int kBytes = static_cast<int>(sizeof(Fp8Shared<Tile>));
  static_assert(kBytes <= 227 << 10);
  batch.tile_tokens = static_cast<int32_t>(std::min<int64_t>(kTokens, round_up(most_tokens, 8)));
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    Fp8Item& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, kN) * ceil_div(item.tokens, kTokens);
    item.w_map = byte_map(item.w.data, item.w.row_bytes, item.w.rows, item.w.cols, kN, true);
    item.x_map = byte_map(item.x, item.x_stride, item.tokens, round_up(item.w.cols, kFp8BlockCols),
                          batch.tile_tokens, true);
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, num_multiprocessors()));
  launch<sm90_linear_fp8<Tile>>({dim3(blocks), Tile::kThreads, kBytes}, stream, batch,
                                static_cast<int>(tiles));
}

struct Fp8TileChoice {
  int tokens, n;
  void (*launch)(Fp8Batch&, int64_t most_tokens, cudaStream_t);
};
template <int kTokens, int kN>
constexpr Fp8TileChoice choice() {
  return {kTokens, kN, launch_tiles<kTokens, kN>};
}
/// The first of the cheapest is taken.
constexpr Fp8TileChoice kTiles[] = {choice<16, 128>(),  choice<16, 64>(),  choice<16, 32>(),
                                    choice<64, 128>(),  choice<64, 64>(),  choice<64, 32>(),
                                    choice<128, 128>(), choice<128, 64>(), choice<128, 32>(),
                                    choice<256, 128>()};

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
  const int64_t step = std::max(tensor * 11 / 8, 300 + (tile.n + box) * 3 / 2);
  const int64_t multiprocessors = num_multiprocessors();
  const int64_t waves = ceil_div(tiles, multiprocessors);
  // Bytes a clock: a multiprocessor takes 20, memory gives 1650 and L2 5600.
  const int64_t memory = std::min<int64_t>(1650, 20 * std::min(tiles, multiprocessors));
  constexpr int64_t kL2 = 5600, kTileEnd = 2500;
  const int64_t token_tiles = ceil_div(most_tokens, tile.tokens);
  return std::max({rows * 128 / memory, tiles * (tile.n + box) * 128 / kL2, waves * step}) +
         waves * kTileEnd / steps + 16 * token_tiles +
         (token_tiles * tile.tokens - most_tokens) / 16;
}

}  // namespace

void launch_linear_sm90_fp8(Fp8Batch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  int64_t most_tokens = 0;
  for (int i = 0; i < batch.count; ++i)
    most_tokens = std::max<int64_t>(most_tokens, batch.items[i].tokens);
  const Fp8TileChoice* best = nullptr;
  int64_t fewest_clocks = 0;
  bool writes_codes = false;
  for (int i = 0; i < batch.count; ++i)
    writes_codes = writes_codes || batch.items[i].out_scale != nullptr;
  for (const Fp8TileChoice& tile : kTiles) {
    if (writes_codes && tile.n != kQuantiseGroup) continue;
    const int64_t clocks = cost(batch, tile);
    if (best != nullptr && clocks >= fewest_clocks) continue;
    best = &tile;
    fewest_clocks = clocks;
  }
  best->launch(batch, most_tokens, stream);
}

}  // namespace dsv4::nvidia
