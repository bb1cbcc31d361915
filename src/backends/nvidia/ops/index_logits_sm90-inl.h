// sm90_index_logits_fp8 (index_logits_sm90a.cu): sizes, shared memory, and the list of tiles, of
// which every CTA finds its part by itself.
#pragma once
#include <cstddef>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/index_logits-inl.h"

namespace dsv4::nvidia::sm90_logits {

using sm80::shared_address;
using sm90::uniform;

struct Traits {
  static constexpr int kWarpgroups = 4;  // that score; one more fetches
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kTile = 64;
  static constexpr int kItemTokens = 2;
  static constexpr int kSlots = 3;  // items whose queries are in shared memory
  static constexpr int kStages = 12;
  static constexpr int kKeyWarps = 3;  // the fourth one fetches queries
  // Multiples of 8 that the 96 registers of every thread at launch add up to.
  static constexpr int kScoreRegisters = 112, kFetchRegisters = 32;
  // A CTA pays for its queries: a tile for every warpgroup, where that leaves enough of them.
  static constexpr int64_t kEnough = 32;
};
static_assert(32 % Traits::kItemTokens == 0);
// A place in the ring is always filled by one warp and read by one warpgroup: with others between,
// the parity that a barrier tells could be that of two phases before.
static_assert(Traits::kStages % Traits::kWarpgroups == 0);
static_assert(Traits::kStages % Traits::kKeyWarps == 0);

constexpr int kKeyThreads = 32 * Traits::kKeyWarps;

/// Tiles [tile, tile_end) of tokens [first, first + count).
struct Part {
  int32_t first, count, tile, tile_end;
};
__device__ __forceinline__ int32_t tiles_of(int32_t entries) {
  return (entries + Traits::kTile - 1) / Traits::kTile;
}
/// Up to 2 neighbouring tokens of one sequence, the most entries that one of them sees.
struct Item {
  int32_t first, count, seq, longest;
  __device__ int32_t tiles() const { return tiles_of(longest); }
};

/// Rows of 128 codes, swizzled by the copy engine.
struct alignas(1024) Keys {
  std::byte codes[Traits::kTile][kIndexDim];
};
struct alignas(1024) Queries {
  std::byte codes[kIndexMaxHeads][kIndexDim];
};
/// What belongs to an item's queries; a part of no tokens is the end of the list.
struct alignas(16) Slot {
  float weights[Traits::kItemTokens][kIndexMaxHeads];
  Part part;
  int32_t end[Traits::kItemTokens];
};

struct Storage {
  Queries queries[Traits::kSlots][Traits::kItemTokens];  // two tokens are one operand
  Keys keys[Traits::kStages];
  alignas(16) float scales[Traits::kStages][Traits::kTile];
  Slot slots[Traits::kSlots];
  uint64_t full[Traits::kStages], empty[Traits::kStages];
  uint64_t queries_full[Traits::kSlots], queries_empty[Traits::kSlots];
  int32_t warp_tiles[Traits::kThreads / 32];
  int32_t first_token, first_tile;
  Item items[Traits::kThreads];  // of up to so many tokens: by first token, or a warp's by lane
};
static_assert(sizeof(Storage) <= 227 * 1024);

/// Arguments of a launch: q and keys are read through maps.
struct LaunchArgs {
  IndexLogitsArgs args;
  CUtensorMap queries, keys;
};

// ---- items and tiles

/// The item that begins at `token`, looked at in one trip to memory. Items do not go beyond a
/// multiple of 32 tokens, so that a warp finds those of its tokens by itself.
__device__ __forceinline__ Item read_item(const IndexLogitsArgs& args, int32_t token) {
  const bool has_next = (token + 1) % 32 != 0 && token + 1 < args.num_tokens;
  const int32_t next = has_next ? token + 1 : token;
  const int32_t seq = __ldg(args.token_to_seq + token), next_seq = __ldg(args.token_to_seq + next);
  const int32_t end = __ldg(args.end + token), next_end = __ldg(args.end + next);
  const bool is_pair = has_next && seq == next_seq;
  const int32_t longest = min(is_pair ? max(end, next_end) : end, args.max_end);
  return {token, is_pair ? 2 : 1, seq, max(longest, 0)};
}
/// By a warp: the item that begins at a lane's token, or one without tokens; `token` of lane 0 is a
/// multiple of 32.
__device__ __forceinline__ Item item_of_lane(const IndexLogitsArgs& args, int32_t token) {
  const int lane = threadIdx.x % 32;
  const bool exists = token < args.num_tokens;
  const int32_t seq = exists ? __ldg(args.token_to_seq + token) : -1;
  const int32_t end = exists ? min(__ldg(args.end + token), args.max_end) : 0;
  const int32_t seq_before = __shfl_up_sync(~0u, seq, 1);
  const uint32_t runs = __ballot_sync(~0u, lane == 0 || seq != seq_before);  // where they begin
  const int run = 31 - __clz(static_cast<int>(runs & ((2u << lane) - 1)));
  const bool is_item = exists && (lane - run) % 2 == 0;
  const bool is_pair = lane < 31 && (runs >> (lane + 1) & 1) == 0;
  const int32_t next_end = __shfl_down_sync(~0u, end, 1);
  const int32_t longest = is_pair ? max(end, next_end) : end;
  return {token, is_item ? (is_pair ? 2 : 1) : 0, seq, is_item ? max(longest, 0) : 0};
}
__device__ __forceinline__ bool has_few_tokens(const IndexLogitsArgs& args) {
  return args.num_tokens <= Traits::kThreads;
}

/// Goes through a CTA's part of the list, item by item.
struct Walk {
  int32_t token, tile, left;
  int32_t items;  // where the items of few tokens are in Storage::items

  __device__ __forceinline__ bool next(const IndexLogitsArgs& args, const Storage& storage,
                                       Item& item, Part& part) {
    while (left > 0) {
      const int32_t first = uniform(token);
      item = has_few_tokens(args) ? storage.items[items + first] : read_item(args, first);
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

/// Brings a table's first row nearer while the list is made, which is the only sequence's where a
/// call is one item: all of it if it is short. By the threads that fetch keys.
__device__ __forceinline__ void touch_first_row(const IndexLogitsArgs& args) {
  constexpr int kSectorBlocks = 32 / sizeof(int32_t), kMost = 2 * kKeyThreads * kSectorBlocks;
  if (args.num_tokens > Traits::kItemTokens || args.table_columns > kMost) return;
  const int thread = static_cast<int>(threadIdx.x) - 128 * Traits::kWarpgroups;
  if (thread < 0 || thread >= kKeyThreads) return;
  for (int block = thread * kSectorBlocks; block < args.table_columns; block += kMost / 2)
    sm90::touch(args.table + block);
}

/// Of the warp's lanes up to this one.
__device__ __forceinline__ int32_t sum_up_to_lane(int32_t value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(~0u, value, distance);
    if (static_cast<int>(threadIdx.x) % 32 >= distance) value += below;
  }
  return value;
}

/// Tiles [from, to) of all `total` are this CTA's.
struct Share {
  int32_t from, to;

  __device__ __forceinline__ Share(const IndexLogitsArgs& args, int32_t total) {
    // total / gridDim.x; the estimate is at most one too large.
    const auto ctas = static_cast<int32_t>(gridDim.x), cta = static_cast<int32_t>(blockIdx.x);
    auto share = static_cast<int32_t>(__umulhi(static_cast<uint32_t>(total), args.per_cta));
    int32_t larger = total - share * ctas;  // parts of one more
    if (larger < 0) share -= 1, larger += ctas;
    from = cta * share + min(cta, larger);
    to = from + share + (cta < larger ? 1 : 0);
  }
};

/// The part of the list that is this CTA's, of up to 32 tokens: every warp by itself.
__device__ __forceinline__ Walk find_part_of_few(const IndexLogitsArgs& args, Storage& storage) {
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) - lane;
  if (args.num_tokens <= Traits::kItemTokens) {  // one item, as a rule: what else is to be found?
    const Item item = read_item(args, 0);
    if (item.count == args.num_tokens) {
      storage.items[first] = item;
      const Share range(args, item.tiles());
      __syncwarp();
      return {0, range.from, range.to - range.from, first};
    }
  }
  const Item item = item_of_lane(args, lane);
  storage.items[threadIdx.x] = item;
  const int32_t tiles = item.tiles(), until = sum_up_to_lane(tiles);
  const Share range(args, __shfl_sync(~0u, until, 31));
  const int32_t skipped = range.from - (until - tiles);  // tiles of this lane's item
  const uint32_t here = __ballot_sync(~0u, 0 <= skipped && skipped < tiles);
  const int token = here != 0 ? __ffs(static_cast<int>(here)) - 1 : 0;
  __syncwarp();
  return {uniform(token), uniform(__shfl_sync(~0u, skipped, token)), uniform(range.to - range.from),
          uniform(first)};
}

/// The same of more; by all threads, with barriers. A warp has 32 tokens, or several times as many
/// in a row.
__device__ __forceinline__ Walk find_part_of_many(const IndexLogitsArgs& args, Storage& storage) {
  constexpr int kWarps = Traits::kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool few = has_few_tokens(args);
  const int32_t warp_tokens = (args.num_tokens + Traits::kThreads - 1) / Traits::kThreads * 32;
  const int32_t begin = warp * warp_tokens;
  const int32_t end = min(args.num_tokens, begin + warp_tokens);
  int32_t tiles = 0;
#pragma unroll 4
  for (int32_t token = begin; token < end; token += 32) {  // loads of some rounds at once
    const Item item = item_of_lane(args, token + lane);
    if (few) storage.items[token + lane] = item;
    tiles += item.tiles();
  }
  const int32_t warp_tiles = __reduce_add_sync(~0u, tiles);
  if (lane == 0) storage.warp_tiles[warp] = warp_tiles;
  __syncthreads();
  const int32_t of_warp = lane < kWarps ? storage.warp_tiles[lane] : 0;
  const Share range(args, __reduce_add_sync(~0u, of_warp));
  const int32_t before = __reduce_add_sync(~0u, lane >= warp ? 0 : of_warp);
  if (before <= range.from && range.from < before + warp_tiles) {
    int32_t at = before;
#pragma unroll 1
    for (int32_t token = begin; token < end && at <= range.from; token += 32) {
      if (!few) tiles = item_of_lane(args, token + lane).tiles();
      const int32_t until = sum_up_to_lane(tiles);
      const int32_t skipped = range.from - at - (until - tiles);  // of this lane's item
      if (0 <= skipped && skipped < tiles) {
        storage.first_token = token + lane, storage.first_tile = skipped;
      }
      at += __shfl_sync(~0u, until, 31);
    }
  }
  __syncthreads();
  return {uniform(storage.first_token), uniform(storage.first_tile), uniform(range.to - range.from),
          0};
}

}  // namespace dsv4::nvidia::sm90_logits
