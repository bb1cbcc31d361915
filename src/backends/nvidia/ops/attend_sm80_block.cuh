// The parts of attend_sm80 that work on one block of rows: its shared memory, fetch, conversion,
// scores, softmax and values. attend_sm80.cuh has the kernel around them.
#pragma once
#include <type_traits>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm80.h"

namespace dsv4::nvidia::attend80 {

using namespace sm80;

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64;
constexpr int kDim = 512;
constexpr int kSlice = kDim / kWarps;  // head dims of a warp
constexpr int kCodeSliceBytes = kRows * kSlice;
constexpr int kWideSliceBytes = 2 * kRows * kSlice;
constexpr int kPRowElems = kRows + 8;  // 144 B: rows of P start in different banks
constexpr uint32_t kAllLanes = 0xffffffffu;

/// kTiles x 16 heads; kStages blocks in flight; scores exchanged kExchangeRows rows at a time.
template <KvFormat kFormat_, int kTiles_, int kStages_, int kExchangeRows_, int kMinCtas_>
struct Traits {
  static constexpr KvFormat kFormat = kFormat_;
  static constexpr int kTiles = kTiles_, kStages = kStages_, kExchangeRows = kExchangeRows_;
  static constexpr int kMinCtas = kMinCtas_;
  static constexpr int kHeads = 16 * kTiles;
  static constexpr bool kScaled = kFormat == KvFormat::kFp8DsMla;
  static constexpr int kStageBytes = kFormat == KvFormat::kBf16 ? kWarps * kWideSliceBytes
                                     : kScaled ? (kWarps - 1) * kCodeSliceBytes + kWideSliceBytes
                                               : kWarps * kCodeSliceBytes;
  static constexpr int kTables = kStages + 1;
  static constexpr int kValuesPerThread = kTiles * kSlice / 2;
};

template <typename T>
struct SharedStorage {
  alignas(128) std::byte ring[T::kStages][T::kStageBytes];
  alignas(128) float scores[T::kTiles][kWarps][16][T::kExchangeRows];
  alignas(16) uint16_t p[T::kHeads][kPRowElems];
  alignas(16) uint32_t scales[T::kScaled ? T::kStages : 1][T::kScaled ? kWarps : 1][kRows];
  alignas(16) RowRef rows[T::kTables][kRows];
  uint32_t valid[T::kTables][2];  // bit per row
  float alpha[T::kHeads];
  float2 weights[T::kHeads];  // of a merge: by_total, by_chain
  float factor[T::kHeads];
};

/// Rows of a block: `block` counts through the blocks of an item.
struct Item {
  int32_t token, tile, chain_begin, chain_end;
  TokenBlocks blocks;
  ChainBlocks span;  // window blocks and compressed blocks of all chains of the item
  __device__ int32_t chain_of(const AttendArgs& args, int32_t block) const {
    return block < span.window_blocks
               ? 0
               : (span.compressed_first + block - span.window_blocks) / args.blocks_per_chain;
  }
};

template <typename T>
__device__ __forceinline__ Item open_item(const AttendArgs& args, const Schedule& schedule,
                                          int32_t index) {
  Item item;
  const int32_t of_chain = index / schedule.spread_chains;
  item.token = of_chain / schedule.tiles;
  item.tile = of_chain - item.token * schedule.tiles;
  item.blocks = token_blocks(args, item.token);
  item.chain_begin = index - of_chain * schedule.spread_chains;
  item.chain_end = schedule.spread_chains > 1 ? min(item.chain_begin + 1, item.blocks.num_chains)
                                              : item.blocks.num_chains;
  item.span.window_blocks = item.chain_begin == 0 ? item.blocks.window_blocks : 0;
  item.span.compressed_first =
      max(item.blocks.compressed_first, item.chain_begin * args.blocks_per_chain);
  const int32_t last = min(item.blocks.compressed_last, item.chain_end * args.blocks_per_chain);
  item.span.count = item.span.window_blocks + max(0, last - item.span.compressed_first);
  return item;
}

// ---- shared memory of a slice
//
// Codes: 64 B a row, two rows a line of 128 B. Which half and which 16-byte chunk a row takes is
// mixed so that both readers are free of bank conflicts: K reads whole rows, V reads 8 bytes of
// rows r, r + 2, r + 4, r + 6. Wide (bf16): 128 B a row, chunks mixed with the row.

__device__ __forceinline__ uint32_t code_offset(int row, int chunk) {
  return static_cast<uint32_t>((row >> 1) * 128 + ((row ^ row >> 1) & 1) * 64 +
                               ((chunk ^ (row >> 1 & 2)) << 4));
}
__device__ __forceinline__ uint32_t wide_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
}

template <typename T>
__device__ __forceinline__ bool is_wide(int warp) {
  return T::kFormat == KvFormat::kBf16 || (T::kScaled && warp == kWarps - 1);
}

// Starts the fetch of a warp's slice of a block, in one group.
template <typename T>
__device__ __forceinline__ void fetch_slice(SharedStorage<T>& shared, int stage, int table,
                                            int warp, int lane, const std::byte* somewhere) {
  const uint32_t to = shared_address(shared.ring[stage]) +
                      warp * (T::kFormat == KvFormat::kBf16 ? kWideSliceBytes : kCodeSliceBytes);
  const int value_offset = warp * (T::kFormat == KvFormat::kBf16 ? 2 * kSlice : kSlice);
  const RowRef* rows = shared.rows[table];
  if (is_wide<T>(warp)) {
#pragma unroll
    for (int half = 0; half < kRows; half += kRows / 2) {
      const std::byte* values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = rows[half + 4 * i + lane / 8].values;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = half + 4 * i + lane / 8, chunk = lane % 8;
        const bool read = values[i] != nullptr;
        copy_async_stream(to + wide_offset(row, chunk),
                          read ? values[i] + value_offset + 16 * chunk : somewhere, read ? 16 : 0);
      }
    }
  } else {
    const std::byte *values[8], *scales[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = rows[8 * i + lane / 4].values;
    if constexpr (T::kScaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[i] = rows[32 * i + lane].scales;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = 8 * i + lane / 4, chunk = lane % 4;
      const bool read = values[i] != nullptr;
      copy_async_stream(to + code_offset(row, chunk),
                        read ? values[i] + value_offset + 16 * chunk : somewhere, read ? 16 : 0);
    }
    if constexpr (T::kScaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool read = scales[i] != nullptr;
        copy_async_4(shared_address(&shared.scales[stage][warp][32 * i + lane]),
                     read ? scales[i] + (warp & 4) : somewhere, read ? 4 : 0);
      }
    }
  }
  copy_async_commit();
}

// ---- E4M3 to bf16
//
// The seven bits below the sign, moved to bits 10..4 of a bf16, read as value * 2^-120; one product
// with 2^(120 + e) gives the value with its scale, subnormal codes included. The exponent of bf16
// ends at 2^127, so that scale bytes above 134 take a second product.

constexpr uint32_t kSigns = 0x80008000u, kMagnitudes = 0x07f007f0u;
constexpr uint32_t kUnscaled = 247u << 7;  // 2^120

struct Multiplier {
  uint32_t first, second;  // second is read by the slow path only
};
__device__ __forceinline__ uint32_t multiplier_bits(uint32_t scale_byte) {
  return (scale_byte + 120) << 7;
}
__device__ __forceinline__ uint32_t first_bits(uint32_t scale_byte) {
  return min(scale_byte + 120, 254u) << 7;
}
__device__ __forceinline__ uint32_t second_bits(uint32_t scale_byte) {
  return scale_byte == 255 ? 0x7fc0u : (max(scale_byte, 134u) - 7) << 7;
}
// `bytes` are the scale bytes of the rows in the low and the high half of a pair.
template <bool kSlow>
__device__ __forceinline__ Multiplier multiplier(uint32_t low_byte, uint32_t high_byte) {
  if constexpr (kSlow) {
    return {first_bits(low_byte) | first_bits(high_byte) << 16,
            second_bits(low_byte) | second_bits(high_byte) << 16};
  } else {
    return {multiplier_bits(low_byte) | multiplier_bits(high_byte) << 16, 0};
  }
}
// Codes in the upper byte of each half; what the lower bytes hold does not matter.
template <bool kSlow>
__device__ __forceinline__ uint32_t to_bf16(uint32_t signs, uint32_t magnitudes, Multiplier m) {
  const uint32_t value = multiply_bf16x2((signs & kSigns) | (magnitudes & kMagnitudes), m.first);
  return kSlow ? multiply_bf16x2(value, m.second) : value;
}

// ---- the three parts of a block

template <typename T>
struct QueryFragments {
  uint32_t a[T::kTiles][4][4];  // tile, step of 16 dims
};

// Dims are dealt to the k indices of the MMA as the K side reads them: see score_slice.
template <typename T>
__device__ __forceinline__ void load_query(const AttendArgs& args, const Item& item, int warp,
                                           int lane, QueryFragments<T>& q) {
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = item.tile * T::kHeads + tile * 16 + half * 8 + group;
      const bool real = head < args.num_heads;
      const uint16_t* row = args.q + item.token * args.q_token_stride +
                            (real ? head : 0) * args.q_head_stride + warp * kSlice;
      if (is_wide<T>(warp)) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const auto* from = reinterpret_cast<const uint32_t*>(row + 16 * step + 2 * quad);
          q.a[tile][step][half] = real ? __ldg(from) : 0;
          q.a[tile][step][half + 2] = real ? __ldg(from + 4) : 0;
        }
      } else {
        const auto* from = reinterpret_cast<const uint4*>(row + 16 * quad);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint4 v = real ? __ldg(from + pair) : uint4{0, 0, 0, 0};
          q.a[tile][2 * pair][half] = permute_bytes(v.x, v.y, 0x5410);
          q.a[tile][2 * pair][half + 2] = permute_bytes(v.x, v.y, 0x7632);
          q.a[tile][2 * pair + 1][half] = permute_bytes(v.z, v.w, 0x5410);
          q.a[tile][2 * pair + 1][half + 2] = permute_bytes(v.z, v.w, 0x7632);
        }
      }
    }
  }
}

// Scores live in shared memory by head and row of the exchange, 8-row chunks mixed with the head.
template <typename T>
__device__ __forceinline__ int score_column(int head, int row) {
  return row ^ ((head & 3) << 3);
}

template <typename T>
__device__ __forceinline__ void put_scores(SharedStorage<T>& shared, int warp, int lane, int row,
                                           const float (&s)[T::kTiles][4]) {
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    const int column = score_column<T>(group, row + 2 * quad);
    *reinterpret_cast<float2*>(&shared.scores[tile][warp][group][column]) = {s[tile][0],
                                                                             s[tile][1]};
    *reinterpret_cast<float2*>(&shared.scores[tile][warp][group + 8][column]) = {s[tile][2],
                                                                                 s[tile][3]};
  }
}

template <typename T>
__device__ __forceinline__ const std::byte* slice_of(const SharedStorage<T>& shared, int stage,
                                                     int warp) {
  return shared.ring[stage] +
         warp * (T::kFormat == KvFormat::kBf16 ? kWideSliceBytes : kCodeSliceBytes);
}

// Rows [first, first + 32) of a block against this warp's 64 dims; `to` is their place in the
// exchange. Lane (group, quad) reads 16 codes of a row: byte pairs (0, 2) and (1, 3) of word `step`
// are its k indices of that step. Four n tiles of 8 rows go side by side: each is a chain of four
// dependent MMAs.
template <typename T, bool kSlow>
__device__ __forceinline__ void score_codes(SharedStorage<T>& shared, int stage, int warp, int lane,
                                            int first, int to, const QueryFragments<T>& q) {
  const int group = lane / 4, quad = lane % 4;
  const std::byte* slice = slice_of<T>(shared, stage, warp);
  uint4 codes[4];
  Multiplier m[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = first + 8 * j + group;
    codes[j] = *reinterpret_cast<const uint4*>(slice + code_offset(row, quad));
    m[j] = {kUnscaled | kUnscaled << 16, 0};
    if constexpr (T::kScaled) {
      const uint32_t byte = shared.scales[stage][warp][row] >> (8 * (warp & 3)) & 0xff;
      m[j] = multiplier<kSlow>(byte, byte);
    }
  }
  float s[4][T::kTiles][4] = {};
  uint32_t nan = 0;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t w = step == 0   ? codes[j].x
                         : step == 1 ? codes[j].y
                         : step == 2 ? codes[j].z
                                     : codes[j].w;
      nan |= (w & 0x7f7f7f7fu) + 0x01010101u;
      const uint32_t b0 = to_bf16<kSlow>(w << 8, w << 4, m[j]);
      const uint32_t b1 = to_bf16<kSlow>(w, w >> 4, m[j]);
#pragma unroll
      for (int tile = 0; tile < T::kTiles; ++tile) {
        mma_bf16(s[j][tile], q.a[tile][step], b0, b1);
      }
    }
  }
  // A row with a NaN code is read, as masked rows hold zeros, and makes its token NaN.
  if (__any_sync(kAllLanes, (nan & 0x80808080u) != 0)) {
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 16; ++j) s[j / 4][tile][j % 4] = NAN;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) put_scores<T>(shared, warp, lane, to + 8 * j, s[j]);
}

template <typename T>
__device__ __forceinline__ void score_wide(SharedStorage<T>& shared, int stage, int warp, int lane,
                                           int first, int to, const QueryFragments<T>& q) {
  const uint32_t slice = shared_address(slice_of<T>(shared, stage, warp));
#pragma unroll
  for (int r = 0; r < 32; r += 16) {
    uint32_t k[2][2][4];  // n tile, pair of steps
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        load_matrix_x4(k[j][pair],
                       slice + wide_offset(first + r + 8 * j + lane % 8, 4 * pair + lane / 8));
      }
    }
    float s[2][T::kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t(&pair)[4] = k[j][step / 2];
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
          mma_bf16(s[j][tile], q.a[tile][step], pair[step % 2 * 2], pair[step % 2 * 2 + 1]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) put_scores<T>(shared, warp, lane, to + r + 8 * j, s[j]);
  }
}

// O += P V over this warp's 64 columns. Codes: lane `group` converts columns 8 group .. + 7, one
// per n tile; wide: n tiles are chunks of 8 columns. column_of says where values went.
template <typename T, bool kSlow>
__device__ __forceinline__ void values_codes(SharedStorage<T>& shared, int stage, int warp,
                                             int lane, float (&o)[T::kTiles][8][4]) {
  const int group = lane / 4, quad = lane % 4;
  const std::byte* slice = slice_of<T>(shared, stage, warp);
  constexpr int kUnroll = kSlow ? 1 : kRows / 16;
#pragma unroll kUnroll
  for (int step = 0; step < kRows; step += 16) {
    uint32_t p[T::kTiles][4];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      load_matrix_x4(p[tile],
                     shared_address(&shared.p[tile * 16 + lane % 16][step + lane / 16 * 8]));
    }
    uint2 codes[4];  // rows 2 quad, 2 quad + 1, and these + 8
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = step + 2 * quad + (i & 1) + (i & 2) * 4;
      codes[i] =
          *reinterpret_cast<const uint2*>(slice + code_offset(row, group >> 1) + (group & 1) * 8);
    }
    Multiplier m[2] = {{kUnscaled | kUnscaled << 16, 0}, {kUnscaled | kUnscaled << 16, 0}};
    if constexpr (T::kScaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 words =
            *reinterpret_cast<const uint2*>(&shared.scales[stage][warp][step + 2 * quad + 8 * i]);
        const int shift = 8 * (warp & 3);
        m[i] = multiplier<kSlow>(words.x >> shift & 0xff, words.y >> shift & 0xff);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t selector = 0x4400u + 0x1111u * (n & 3);
      const auto word = [&](int i) { return n < 4 ? codes[i].x : codes[i].y; };
      const uint32_t x0 = permute_bytes(word(0), word(1), selector);
      const uint32_t x1 = permute_bytes(word(2), word(3), selector);
      const uint32_t b0 = to_bf16<kSlow>(x0, x0 >> 4, m[0]), b1 = to_bf16<kSlow>(x1, x1 >> 4, m[1]);
#pragma unroll
      for (int tile = 0; tile < T::kTiles; ++tile) mma_bf16(o[tile][n], p[tile], b0, b1);
    }
  }
}

template <typename T>
__device__ __forceinline__ void values_wide(SharedStorage<T>& shared, int stage, int warp, int lane,
                                            float (&o)[T::kTiles][8][4]) {
  const uint32_t slice = shared_address(shared.ring[stage]) +
                         warp * (T::kFormat == KvFormat::kBf16 ? kWideSliceBytes : kCodeSliceBytes);
#pragma unroll 1
  for (int step = 0; step < kRows; step += 16) {
    uint32_t p[T::kTiles][4];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      load_matrix_x4(p[tile],
                     shared_address(&shared.p[tile * 16 + lane % 16][step + lane / 16 * 8]));
    }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t v[4];
      load_matrix_x4_transposed(v, slice + wide_offset(step + lane % 16, n + lane / 16));
#pragma unroll
      for (int tile = 0; tile < T::kTiles; ++tile) {
        mma_bf16(o[tile][n], p[tile], v[0], v[1]);
        mma_bf16(o[tile][n + 1], p[tile], v[2], v[3]);
      }
    }
  }
}

/// The softmax of heads 2 warp and 2 warp + 1 of each tile: 16 lanes a head, lane i of them has
/// rows 2i, 2i + 1, 32 + 2i, 33 + 2i. Values are the same in the 16 lanes.
template <typename T>
struct HeadState {
  float max[T::kTiles], sum[T::kTiles];              // of the open chain
  float total_max[T::kTiles], total_sum[T::kTiles];  // of the chains before it
};

// Adds the eight slices of rows [from, from + 32) of the exchange into z[.][at], z[.][at + 1].
template <typename T, int kAt>
__device__ __forceinline__ void gather_scores(const SharedStorage<T>& shared, int warp, int lane,
                                              int from, float (&z)[T::kTiles][4]) {
  const int head = 2 * warp + lane / 16;
  const int column = score_column<T>(head, from + 2 * (lane % 16));
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    float2 slices[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      slices[w] = *reinterpret_cast<const float2*>(&shared.scores[tile][w][head][column]);
    }
    float2 sum = slices[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      sum.x += slices[w].x;
      sum.y += slices[w].y;
    }
    z[tile][kAt] = sum.x;
    z[tile][kAt + 1] = sum.y;
  }
}

template <typename T>
__device__ __forceinline__ void softmax(const AttendArgs& args, SharedStorage<T>& shared, int table,
                                        int warp, int lane, bool first_of_chain,
                                        float (&z)[T::kTiles][4], HeadState<T>& state) {
  const int head = 2 * warp + lane / 16, i = lane % 16;
  const uint32_t valid[2] = {shared.valid[table][0] >> (2 * i), shared.valid[table][1] >> (2 * i)};
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    float max = first_of_chain ? -INFINITY : state.max[tile];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool read = (valid[j / 2] >> (j & 1) & 1) != 0;
      z[tile][j] = read ? __fmul_rn(z[tile][j], args.scale_log2) : -INFINITY;
      max = fmaxf(max, z[tile][j]);
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, step));
    const float alpha = first_of_chain ? 0.0f : exp2_approx(state.max[tile] - max);
    float p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool read = (valid[j / 2] >> (j & 1) & 1) != 0;
      p[j] = read ? exp2_approx(z[tile][j] - max) : 0.0f;
    }
    float sum = (p[0] + p[1]) + (p[2] + p[3]);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    state.sum[tile] = first_of_chain ? sum : __fmaf_rn(state.sum[tile], alpha, sum);
    state.max[tile] = max;
    auto* row = reinterpret_cast<uint32_t*>(shared.p[tile * 16 + head]);
    row[i] = pack_bf16x2(p[0], p[1]);
    row[16 + i] = pack_bf16x2(p[2], p[3]);
    if (i == 0) shared.alpha[tile * 16 + head] = alpha;
  }
}

template <typename T>
__device__ __forceinline__ void rescale(const SharedStorage<T>& shared, int lane,
                                        float (&o)[T::kTiles][8][4]) {
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    const float low = shared.alpha[tile * 16 + lane / 4];
    const float high = shared.alpha[tile * 16 + 8 + lane / 4];
    if (__all_sync(kAllLanes, low == 1.0f && high == 1.0f)) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      o[tile][n][0] *= low;
      o[tile][n][1] *= low;
      o[tile][n][2] *= high;
      o[tile][n][3] *= high;
    }
  }
}

}  // namespace dsv4::nvidia::attend80
