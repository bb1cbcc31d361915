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
static_assert(32 % Traits::kItemTokens == 0);
// A place in the ring is always filled by one warp and read by one warpgroup: with others between,
// the parity that a barrier tells could be that of two phases before.
static_assert(Traits::kStages % Traits::kWarpgroups == 0);
static_assert(Traits::kStages % Traits::kKeyWarps == 0);

constexpr int kKeyThreads = 32 * Traits::kKeyWarps;
/// Queries are read in pieces of 16 bytes: dims [8 i, 8 i + 8) of a head.
constexpr int kHeadPieces = kIndexDim / 8, kTokenPieces = kIndexMaxHeads * kHeadPieces;

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
__device__ __forceinline__ int32_t tiles_of(int32_t entries) {
  return (entries + Traits::kTile - 1) / Traits::kTile;
}
/// Up to 8 neighbouring tokens of one sequence, the most entries that one of them sees.
struct Item {
  int32_t first, count, seq, longest;
  __device__ int32_t tiles() const { return tiles_of(longest); }
};
/// Of a warp's tokens: tiles, items that have any, most tiles of one of these.
struct WarpItems {
  int32_t tiles, items, most;
};
struct alignas(128) Stage {
  uint4 values[Traits::kTile][kIndexDim / 16];
  float scales[Traits::kTile];
};

struct Storage {
  Queries queries[Traits::kSlots][Traits::kItemTokens];
  Stage stages[Traits::kStages];
  uint4 pieces[kTokenPieces];  // bf16 queries of a token to come
  float weights[kIndexMaxHeads];
  int32_t end;
  Token tokens[Traits::kSlots][Traits::kItemTokens];
  uint64_t full[Traits::kStages], empty[Traits::kStages];
  uint64_t queries_full[Traits::kSlots], queries_empty[Traits::kSlots];
  uint64_t first_full;
  WarpItems warp_items[Traits::kThreads / 32];
  int32_t first_token, first_tile;
  Item items[Traits::kThreads];  // of up to so many tokens: by first token, or a warp's by lane
};
static_assert(sizeof(Storage) <= 227 * 1024);

/// The same value in all lanes, and known to be: products in flight are not for branches that might
/// split a warp.
__device__ __forceinline__ int32_t uniform(int32_t value) {
  return __shfl_sync(~0u, value, 0);
}

// ---- items and tiles

/// The item that begins at `token`, looked at in one trip to memory. Tokens [8 i, 8 (i + 1)) are
/// cut where the sequence changes.
__device__ __forceinline__ Item read_item(const IndexLogitsArgs& args, int32_t token) {
  constexpr int kTokens = Traits::kItemTokens;
  const int32_t limit = min(args.num_tokens, (token / kTokens + 1) * kTokens);
  int32_t seqs[kTokens], ends[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int32_t at = min(token + i, limit - 1);
    seqs[i] = __ldg(args.token_to_seq + at);
    ends[i] = min(__ldg(args.end + at), args.max_end);
  }
  Item item{token, 1, seqs[0], ends[0]};
#pragma unroll
  for (int i = 1; i < kTokens; ++i) {
    const bool inside = item.count == i && token + i < limit && seqs[i] == item.seq;
    item.longest = inside ? max(item.longest, ends[i]) : item.longest;
    item.count += inside ? 1 : 0;
  }
  item.longest = max(item.longest, 0);
  return item;
}
/// By a warp: the item that begins at a lane's token, or one without tokens; `token` of lane 0 is a
/// multiple of 32.
__device__ __forceinline__ Item item_of_lane(const IndexLogitsArgs& args, int32_t token) {
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
  const bool is_item = begins && exists;
  return {token, is_item ? next - lane : 0, seq, is_item ? max(longest, 0) : 0};
}
__device__ __forceinline__ bool has_few_tokens(const IndexLogitsArgs& args) {
  return args.num_tokens <= Traits::kThreads;
}

/// Goes through a CTA's part of the list, item by item.
struct Walk {
  int32_t token, tile, left;
  int32_t items;   // where the items of few tokens are in Storage::items
  bool has_whole;  // items: `left` counts these, not tiles

  __device__ __forceinline__ bool next(const IndexLogitsArgs& args, const Storage& storage,
                                       Item& item, Part& part) {
    while (left > 0) {
      const int32_t first = uniform(token);
      item = has_few_tokens(args) ? storage.items[items + first] : read_item(args, first);
      item.count = uniform(item.count), item.longest = uniform(item.longest);
      const int32_t tiles = item.tiles();
      part = {item.first, item.count, tile, has_whole ? tiles : min(tiles, tile + left)};
      token = item.first + item.count;
      tile = 0;
      left -= has_whole ? min(tiles, 1) : part.tile_end - part.tile;
      if (part.tile_end > part.tile) return true;
    }
    return false;
  }
};

/// Brings queries nearer while the list is made: in a batch of equal lengths they are those that
/// this CTA begins with.
__device__ __forceinline__ int64_t likely_token(const IndexLogitsArgs& args) {
  return blockIdx.x * static_cast<uint32_t>(args.num_tokens) / gridDim.x;
}
__device__ __forceinline__ void touch_queries(const IndexLogitsArgs& args, int64_t token) {
  constexpr int kHeadSectors = kIndexDim * 2 / 32;
  static_assert(kHeadSectors * kIndexMaxHeads <= Traits::kThreads);
  const int head = static_cast<int>(threadIdx.x) / kHeadSectors,
            sector = threadIdx.x % kHeadSectors;
  if (head >= args.num_heads) return;
  sm90::touch(args.q + token * args.q_token_stride + head * args.q_head_stride + sector * 16);
}

/// The same of a table's first row, which is the only sequence's where a call is one token's: all
/// of it if it is short. By the threads that fetch keys.
__device__ __forceinline__ void touch_first_row(const IndexLogitsArgs& args) {
  constexpr int kSectorBlocks = 32 / sizeof(int32_t), kMost = 2 * kKeyThreads * kSectorBlocks;
  if (args.num_tokens > 1 || args.table_columns > kMost) return;
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

/// [from, to) of a list of `total` are this CTA's.
struct Share {
  int32_t from, to, most;

  __device__ __forceinline__ Share(const IndexLogitsArgs& args, int32_t total) {
    // total / gridDim.x; the estimate is at most one too large.
    const auto ctas = static_cast<int32_t>(gridDim.x), cta = static_cast<int32_t>(blockIdx.x);
    auto share = static_cast<int32_t>(__umulhi(static_cast<uint32_t>(total), args.per_cta));
    int32_t larger = total - share * ctas;  // parts of one more
    if (larger < 0) share -= 1, larger += ctas;
    from = cta * share + min(cta, larger);
    to = from + share + (cta < larger ? 1 : 0);
    most = share + (larger > 0 ? 1 : 0);
  }
};

/// The part of the list that is this CTA's, of up to 32 tokens: every warp by itself.
__device__ __forceinline__ Walk find_part_of_few(const IndexLogitsArgs& args, Storage& storage) {
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) - lane;
  const Item item = item_of_lane(args, lane);
  storage.items[threadIdx.x] = item;
  const int32_t tiles = item.tiles(), until = sum_up_to_lane(tiles);
  const Share range(args, __shfl_sync(~0u, until, 31));
  const int32_t skipped = range.from - (until - tiles);  // tiles of this lane's item
  const uint32_t here = __ballot_sync(~0u, 0 <= skipped && skipped < tiles);
  const int token = here != 0 ? __ffs(static_cast<int>(here)) - 1 : 0;
  __syncwarp();
  return {uniform(token), uniform(__shfl_sync(~0u, skipped, token)), uniform(range.to - range.from),
          uniform(first), false};
}

/// The part of the list that is this CTA's; by all threads, with barriers. A warp has 32 tokens, or
/// several times as many in a row.
__device__ __forceinline__ Walk find_part(const IndexLogitsArgs& args, Storage& storage) {
  if (args.num_tokens <= 32) return find_part_of_few(args, storage);
  constexpr int kWarps = Traits::kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool few = has_few_tokens(args);
  const int32_t warp_tokens = (args.num_tokens + Traits::kThreads - 1) / Traits::kThreads * 32;
  const int32_t begin = warp * warp_tokens;
  const int32_t end = min(args.num_tokens, begin + warp_tokens);
  int32_t tiles = 0, items = 0, most = 0;
#pragma unroll 1
  for (int32_t token = begin; token < end; token += 32) {
    const Item item = item_of_lane(args, token + lane);
    if (few) storage.items[token + lane] = item;
    tiles += item.tiles(), items += min(item.tiles(), 1);
    most = max(most, item.tiles());
  }
  WarpItems mine{__reduce_add_sync(~0u, tiles), __reduce_add_sync(~0u, items),
                 __reduce_max_sync(~0u, most)};
  if (lane == 0) storage.warp_items[warp] = mine;
  __syncthreads();
  const WarpItems of_warp = lane < kWarps ? storage.warp_items[lane] : WarpItems{};
  const int32_t all_tiles = __reduce_add_sync(~0u, of_warp.tiles);
  const int32_t all_items = __reduce_add_sync(~0u, of_warp.items);
  const int32_t longest = __reduce_max_sync(~0u, of_warp.most);
  // An item that two CTAs share has its queries put down twice: worth about two tiles.
  const Share by_tiles(args, all_tiles), by_items(args, all_items);
  const bool has_whole = by_items.most * longest <= by_tiles.most + 2;
  const Share range = has_whole ? by_items : by_tiles;
  const int32_t before = __reduce_add_sync(~0u, lane >= warp ? 0
                                                : has_whole  ? of_warp.items
                                                             : of_warp.tiles);
  if (before <= range.from && range.from < before + (has_whole ? mine.items : mine.tiles)) {
    int32_t at = before;
#pragma unroll 1
    for (int32_t token = begin; token < end; token += 32) {
      if (!few) tiles = item_of_lane(args, token + lane).tiles();
      const int32_t value = has_whole ? min(tiles, 1) : tiles, until = sum_up_to_lane(value);
      const int32_t skipped = range.from - at - (until - value);  // of this lane's item
      if (0 <= skipped && skipped < value) {
        storage.first_token = token + lane, storage.first_tile = skipped;
      }
      at += __shfl_sync(~0u, until, 31);
    }
  }
  __syncthreads();
  return {uniform(storage.first_token), uniform(storage.first_tile), uniform(range.to - range.from),
          0, uniform(has_whole) != 0};
}

}  // namespace dsv4::nvidia::sm90_logits
