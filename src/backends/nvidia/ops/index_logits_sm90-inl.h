// sm90_index_logits_fp8 (index_logits_sm90a.cu): sizes, shared memory, and the list of tiles, of
// which every CTA finds its part by itself.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/index_logits-inl.h"

namespace dsv4::nvidia::sm90_logits {

using sm80::shared_address;

struct Traits {
  static constexpr int kWarpgroups = 4;  // that score; one more fetches
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kTile = 64;
  static constexpr int kSteps = kIndexDim / 32;
  static constexpr int kItemTokens = 8;
  static constexpr int kSlots = 2;       // items whose queries are in shared memory
  static constexpr int kShortPart = 64;  // tiles times tokens
  static constexpr int kStages = 8;
  static constexpr int kKeyWarps = 2;
  // Multiples of 8 that the 96 registers of every thread at launch add up to.
  static constexpr int kScoreRegisters = 112, kFetchRegisters = 32;
  // A CTA pays for its queries: a tile for every warpgroup, where that leaves enough of them.
  static constexpr int64_t kEnough = 32;
};
// A place in the ring is always filled by one warp and read by one warpgroup: with others between,
// the parity that a barrier tells could be that of two phases before.
static_assert(Traits::kStages % Traits::kWarpgroups == 0);
static_assert(Traits::kStages % Traits::kKeyWarps == 0);

/// Queries of one token: rows of 128 codes, swizzled; dims in the order of the lanes' registers.
/// Two tokens are one operand of 128 rows.
struct alignas(1024) Queries {
  uint4 units[kIndexMaxHeads * 8];
};
struct Token {
  float4 weights[4][4];  // [n][t]: heads 16 n + 2 t, + 1, + 8, + 9; every second one halved
  int32_t end;
  int32_t unused[3];
};
/// Tiles [tile, tile_end) of tokens [first, first + count) are this CTA's.
struct Part {
  int32_t first, count, tile, tile_end;
};
/// Up to 8 neighbouring tokens of one sequence, the most entries that one of them sees.
struct Item {
  int32_t first, count, seq, longest;
  __device__ int32_t tiles() const { return (longest + Traits::kTile - 1) / Traits::kTile; }
};
struct alignas(128) Stage {
  uint4 values[Traits::kTile][kIndexDim / 16];
  float scales[Traits::kTile];
};

constexpr int kTokenPieces =
    kIndexMaxHeads * kIndexDim / 8 / (128 * Traits::kWarpgroups);  // of 16 bytes, for a thread

struct Storage {
  Queries queries[Traits::kSlots][Traits::kItemTokens];
  Stage stages[Traits::kStages];
  uint4 pieces[kTokenPieces][128 * Traits::kWarpgroups];  // bf16 queries of a token to come
  float weights[kIndexMaxHeads];
  int32_t end;
  Token tokens[Traits::kSlots][Traits::kItemTokens];
  uint64_t full[Traits::kStages], empty[Traits::kStages];
  uint64_t queries_full[Traits::kSlots], queries_empty[Traits::kSlots];
  uint64_t first_full;  // all threads but those of the keys
  int32_t warp_tiles[Traits::kThreads / 32];
  int32_t first_token, first_tile;
  Item items[Traits::kThreads];  // by first token, where tokens are not more than these
};
static_assert(sizeof(Storage) <= 227 * 1024);

/// The same value in all lanes, and known to be: products in flight are not for branches that might
/// split a warp.
__device__ __forceinline__ int32_t uniform(int32_t value) {
  return __shfl_sync(~0u, value, 0);
}

// ---- items and tiles

/// Does an item begin here? Tokens [8 i, 8 (i + 1)) are cut where the sequence changes.
__device__ __forceinline__ bool begins_item(const IndexLogitsArgs& args, int32_t token) {
  return token % Traits::kItemTokens == 0 ||
         __ldg(args.token_to_seq + token) != __ldg(args.token_to_seq + token - 1);
}
__device__ __forceinline__ Item read_item(const IndexLogitsArgs& args, int32_t token) {
  const int32_t limit =
      min(args.num_tokens, (token / Traits::kItemTokens + 1) * Traits::kItemTokens);
  Item item{token, 0, __ldg(args.token_to_seq + token), 0};
#pragma unroll 1
  for (int32_t next = token; next < limit; ++next) {
    const int32_t seq = __ldg(args.token_to_seq + next), end = __ldg(args.end + next);
    if (seq != item.seq) break;
    item.longest = max(item.longest, min(end, args.max_end));
    ++item.count;
  }
  return item;
}
/// Few tokens: one trip to memory for all of them, by all threads; the item that begins at a
/// thread's token, or one without tokens.
__device__ __forceinline__ Item item_of_thread(const IndexLogitsArgs& args) {
  static_assert(32 % Traits::kItemTokens == 0);
  const auto token = static_cast<int32_t>(threadIdx.x);
  const int lane = threadIdx.x % 32;
  const bool exists = token < args.num_tokens;
  const int32_t seq = exists ? __ldg(args.token_to_seq + token) : -1;
  int32_t longest = exists ? min(__ldg(args.end + token), args.max_end) : 0;
  const int32_t seq_before = __shfl_up_sync(~0u, seq, 1);
  const bool begins = token % Traits::kItemTokens == 0 || seq != seq_before;
  const uint32_t later = __ballot_sync(~0u, begins) & (0u - (2u << lane));
  const int next = later != 0 ? __ffs(static_cast<int>(later)) - 1 : 32;
#pragma unroll
  for (int distance = 1; distance < Traits::kItemTokens; distance *= 2) {
    const int32_t other = __shfl_down_sync(~0u, longest, distance);
    if (lane + distance < next) longest = max(longest, other);
  }
  return {token, begins && exists ? next - lane : 0, seq, longest};
}
__device__ __forceinline__ bool has_few_tokens(const IndexLogitsArgs& args) {
  return args.num_tokens <= Traits::kThreads;
}
/// The item that begins at `token`; after find_part().
__device__ __forceinline__ Item item_at(const IndexLogitsArgs& args, const Storage& storage,
                                        int32_t token) {
  return has_few_tokens(args) ? storage.items[token] : read_item(args, token);
}

/// Goes through a CTA's part of the list, item by item.
struct Walk {
  int32_t token, tile, left;

  __device__ __forceinline__ bool next(const IndexLogitsArgs& args, const Storage& storage,
                                       Item& item, Part& part) {
    while (left > 0) {
      item = item_at(args, storage, uniform(token));
      item.count = uniform(item.count), item.longest = uniform(item.longest);
      part = {item.first, item.count, tile, min(item.tiles(), tile + left)};
      token = item.first + item.count;
      tile = 0;
      left -= part.tile_end - part.tile;
      if (part.tile_end > part.tile) return true;
    }
    return false;
  }
};

/// Brings queries nearer while the list is made: in a batch of equal lengths they are those that
/// this CTA begins with. By warps that have no tokens to look at in small calls.
__device__ __forceinline__ void touch_likely_queries(const IndexLogitsArgs& args) {
  constexpr int kHeadLines = kIndexDim * 2 / 128, kLines = kIndexMaxHeads * kHeadLines;
  static_assert(kLines == 128);
  const int line = static_cast<int>(threadIdx.x) - Traits::kThreads + kLines;
  if (line < 0 || line / kHeadLines >= args.num_heads) return;
  const auto token =
      static_cast<int64_t>(blockIdx.x * static_cast<uint32_t>(args.num_tokens) / gridDim.x);
  sm90::touch(args.q + token * args.q_token_stride + line / kHeadLines * args.q_head_stride +
              line % kHeadLines * 64);
}

/// The part of the list that is this CTA's; by all threads, with barriers.
__device__ Walk find_part(const IndexLogitsArgs& args, Storage& storage) {
  constexpr int kWarps = Traits::kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool few = has_few_tokens(args);
  const int32_t per_thread = (args.num_tokens + Traits::kThreads - 1) / Traits::kThreads;
  const int32_t begin = min(args.num_tokens, static_cast<int32_t>(threadIdx.x) * per_thread);
  const int32_t end = min(args.num_tokens, begin + per_thread);
  int32_t mine = 0;
  if (few) {
    const Item item = item_of_thread(args);
    storage.items[threadIdx.x] = item;
    mine = item.count > 0 ? item.tiles() : 0;
  } else {
#pragma unroll 1
    for (int32_t token = begin; token < end; ++token) {
      if (begins_item(args, token)) mine += read_item(args, token).tiles();
    }
  }
  int32_t sum = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) storage.warp_tiles[warp] = sum;
  __syncthreads();
  const int32_t of_warp = lane < kWarps ? storage.warp_tiles[lane] : 0;
  const int32_t total = __reduce_add_sync(~0u, of_warp);
  const int32_t before = __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + sum - mine;
  const int32_t share = total / static_cast<int32_t>(gridDim.x);
  const int32_t larger = total - share * static_cast<int32_t>(gridDim.x);  // parts of one tile more
  const auto cta = static_cast<int32_t>(blockIdx.x);
  const int32_t from = cta * share + min(cta, larger), to = from + share + (cta < larger ? 1 : 0);
  if (before <= from && from < before + mine) {
    int32_t at = before, token = begin;
    if (!few) {
#pragma unroll 1
      for (; token < end; ++token) {
        const int32_t tiles = begins_item(args, token) ? read_item(args, token).tiles() : 0;
        if (from < at + tiles) break;
        at += tiles;
      }
    }
    storage.first_token = token, storage.first_tile = from - at;
  }
  __syncthreads();
  return {uniform(storage.first_token), uniform(storage.first_tile), uniform(to - from)};
}

}  // namespace dsv4::nvidia::sm90_logits
