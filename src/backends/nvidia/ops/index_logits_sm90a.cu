// sm90_index_logits_fp8: scores of FP8 indexer keys by E4M3 warpgroup products.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; up to 64 heads x
//           128 dims; keys of 132 B in pages
// Tiling    An item is up to 8 neighbouring tokens of one sequence, a tile 64 keys. All tiles of
//           all items are one list, of which a CTA takes an equal part (several items, or a part of
//           one). Two warps fetch tiles as bulk copies into a ring, two put down the queries of the
//           next item as E4M3 codes (all help where parts are short); 4 warpgroups take tiles in
//           turn: keys go to registers as the left operand (the place in the ring is free again
//           then) and meet two tokens at a time, 64 x 128 x 128, whose sums are folded (ReLU,
//           weight, sum over heads) in the lanes while the other warpgroups multiply
// Budget    decode: 132 B a key, 528 clocks a tile and multiprocessor at 4.2 TB/s, of which the
//           matrix unit works 128; 66 KiB in flight. Prefill: a tile and token takes 128 clocks of
//           the matrix unit, 64 of shared memory for queries and 64 for weights, about 90 issue
//           slots of each scheduler
// Launch    grid min(132, most tiles), 640 threads, smem = sizeof(Storage), 1 CTA/SM
// Contract  dim 128, heads 1..64, pages and queries aligned to 16 bytes; rows of a page a multiple
//           of 64, or a divisor of it from 4 on (else, and for MXFP4 keys, sm80_index_logits runs).
//           Rows of a page are fetched up to the next multiple of 4 after `end`
// Numerics  products of E4M3 are exact; the matrix unit adds them up with about 14 bits (bound:
//           tests/ops/oracle_index_test.cc). Heads 2t, 2t + 1, 8 + 2t, ... of lane t ascending by
//           fma, lanes (0 + 1) + (2 + 3), times k_scale. Nothing depends on tile, item or CTA. NaN
//           stays NaN.
#include <algorithm>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/index_logits-inl.h"
#include "backends/nvidia/ops/launch.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

using sm80::shared_address;

struct Traits {
  static constexpr int kWarpgroups = 4;  // that score; one more fetches
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kTile = 64;
  static constexpr int kSteps = kIndexDim / 32;
  static constexpr int kItemTokens = 8;
  static constexpr int kSlots = 2;       // items whose queries are in shared memory
  static constexpr int kShortPart = 64;  // tiles
  static constexpr int kStages = 8;
  static constexpr int kKeyWarps = 2;
  static constexpr int kQueryThreads = 128 - 32 * kKeyWarps;
  // Multiples of 8 that the 96 registers of every thread at launch add up to.
  static constexpr int kScoreRegisters = 112, kFetchRegisters = 32;
  static constexpr int64_t kMultiprocessors = 132;
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

struct Storage {
  Queries queries[Traits::kSlots][Traits::kItemTokens];
  Stage stages[Traits::kStages];
  Token tokens[Traits::kSlots][Traits::kItemTokens];
  uint64_t full[Traits::kStages], empty[Traits::kStages];
  uint64_t queries_full[Traits::kSlots], queries_empty[Traits::kSlots];
  uint64_t together;  // all threads but those of the keys
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

// ---- what the fetching warps do

/// Keys of a CTA's tiles, in order, into the ring; tile i by warp i % kKeyWarps. A copy takes a
/// thread some hundred clocks from its addresses on, so these are reckoned by all lanes before.
__device__ __forceinline__ void fetch_keys(const IndexLogitsArgs& args, Storage& storage, Walk walk,
                                           int warp) {
  constexpr int kTile = Traits::kTile, kKeyWarps = Traits::kKeyWarps;
  const int lane = threadIdx.x % 32;
  // A run: rows of one page within a tile. A lane has every 32nd run of the warp's tiles.
  // Powers of two: a division is a hundred clocks before the first key.
  const int32_t run_rows = min(args.rows_per_block, kTile);
  const int32_t runs_shift = __clz(run_rows) - __clz(kTile), tile_runs = 1 << runs_shift;
  int32_t stage = warp, skip = warp;  // tiles to the warp's next one
  uint32_t parity = 1;                // of the phase before the first: waiting for it is no waiting
  bool is_first = true;
  Item item;
  Part part;
  while (walk.next(args, storage, item, part)) {
    const int32_t* table = args.table + item.seq * args.table_stride;
    const int32_t tiles = part.tile_end - part.tile;
    const int32_t mine = skip < tiles ? (tiles - skip + kKeyWarps - 1) / kKeyWarps : 0;
    const int32_t first_tile = part.tile + skip, runs = mine * tile_runs;
    skip += mine * kKeyWarps - tiles;
    const auto entry_of = [&](int32_t run) {
      return (first_tile + (run >> runs_shift) * kKeyWarps) * kTile +
             (run & (tile_runs - 1)) * run_rows;
    };
    const auto block_of = [&](int32_t run) {
      const int32_t entry = entry_of(run);
      return run < runs && entry < item.longest
                 ? __ldg(table + (args.rows_shift >= 0 ? entry >> args.rows_shift
                                                       : entry / args.rows_per_block))
                 : 0;
    };
    int32_t next_block = block_of(lane);
    if (walk.left > 0 && has_few_tokens(args)) {  // the next item's pages are asked for meanwhile
      const int32_t* next_table = args.table + storage.items[walk.token].seq * args.table_stride;
      if (lane * args.rows_per_block < storage.items[walk.token].longest)
        sm90::touch(next_table + lane);
    }
    for (int32_t begin = 0; begin < runs; begin += 32) {
      const int64_t block = next_block;
      next_block = block_of(begin + 32 + lane);
      const int32_t entry = entry_of(begin + lane), in_tile = entry % kTile;
      const int32_t row =
          args.rows_shift >= 0 ? entry & (args.rows_per_block - 1) : entry % args.rows_per_block;
      // Whole groups of 4 rows: their scales are 16 bytes.
      const int32_t left = (item.longest - entry + 3) / 4 * 4;
      const auto rows = static_cast<uint32_t>(min(run_rows, left));
      const auto tile_rows = static_cast<uint32_t>(min(kTile, left));
      const std::byte* page = args.cache + block * args.block_stride_bytes;
      const std::byte* values = page + int64_t{row} * kIndexDim;
      const std::byte* scales = page + int64_t{args.rows_per_block} * kIndexDim + row * 4;
      const auto copy = [&](int32_t to_stage, bool starts) {
        const uint32_t full = shared_address(&storage.full[to_stage]);
        Stage& to = storage.stages[to_stage];
        if (starts) sm90::mbarrier_arrive_expecting(full, tile_rows * (kIndexDim + 4));
        if (left > 0) {
          sm90::copy_bulk(shared_address(to.values[in_tile]), values, rows * kIndexDim, full);
          sm90::copy_bulk(shared_address(to.scales + in_tile), scales, rows * 4, full);
        }
      };
      int i = 0;
      if (is_first) {  // the ring is empty: what fits, by a lane each
        is_first = false;
        const int tiles_now = min(min(32, runs) >> runs_shift, Traits::kStages / kKeyWarps);
        i = tiles_now << runs_shift;
        if (lane < i) copy(stage + (lane >> runs_shift) * kKeyWarps, (lane & (tile_runs - 1)) == 0);
        __syncwarp();
        stage += tiles_now * kKeyWarps;
        if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;
      }
      for (; i < min(32, runs - begin); ++i) {
        const bool starts = (i & (tile_runs - 1)) == 0;  // `begin` is a multiple of 32
        if (starts) sm90::mbarrier_wait(shared_address(&storage.empty[stage]), parity);
        if (lane == i) copy(stage, starts);
        __syncwarp();
        if (((i + 1) & (tile_runs - 1)) == 0) {
          stage += kKeyWarps;
          if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;
        }
      }
    }
  }
}

/// Queries and weights of an item into `slot`, and of the next one, if it has tokens, into the
/// other slot; by `threads` threads.
template <int kBatch = 2>
__device__ __forceinline__ void put_queries(const IndexLogitsArgs& args, Storage& storage, int slot,
                                            const Part& part, const Part& next, int thread,
                                            int threads) {
  static_assert(Traits::kSlots == 2);
  const int tokens = part.count + next.count;
  struct Place {
    int32_t token, slot, in_slot;
  };
  const auto place_of = [&](int i) -> Place {
    return i < part.count ? Place{part.first + i, slot, i}
                          : Place{next.first + i - part.count, 1 - slot, i - part.count};
  };
  struct Weight {
    float value;
    int32_t end;
  };
  const auto head_of = [](int i) {
    const int place = i % kIndexMaxHeads;
    return place / 16 * 16 + place / 4 % 4 * 2 + place % 4 / 2 * 8 + place % 2;
  };
  const auto load_weight = [&](int i) -> Weight {
    const int32_t token = place_of(i / kIndexMaxHeads).token, head = head_of(i);
    return {head < args.num_heads ? __ldg(args.weights + token * args.weights_stride + head) : 0.0f,
            __ldg(args.end + token)};
  };
  const int num_weights = tokens * kIndexMaxHeads;
  Weight first_weight{};  // beside the queries, not after them
  if (thread < num_weights) first_weight = load_weight(thread);

  // Unit u of a head, word t: four dims from 64 (u / 4) + 16 t + 4 (u % 4) on. Loads of two units
  // are on their way at once: beside the scoring it is few threads that do this.
  constexpr int kTokenUnits = kIndexMaxHeads * 8;
  const int units = tokens * kTokenUnits;
#pragma unroll 1
  for (int begin = thread; begin < units; begin += kBatch * threads) {
    uint2 values[kBatch][4];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = min(begin + b * threads, units - 1), unit = i % 8;
      const int head = min(i / 8 % kIndexMaxHeads, args.num_heads - 1);
      const uint16_t* q = args.q + place_of(i / kTokenUnits).token * args.q_token_stride +
                          head * args.q_head_stride + unit / 4 * 64 + unit % 4 * 4;
#pragma unroll
      for (int t = 0; t < 4; ++t) values[b][t] = __ldg(reinterpret_cast<const uint2*>(q + 16 * t));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * threads, head = i / 8 % kIndexMaxHeads, unit = i % 8;
      if (i >= units) break;
      uint32_t words[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint2 v = values[b][t];
        words[t] = sm90::e4m3x2(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u)) |
                   sm90::e4m3x2(__uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u))
                       << 16;
        if (head >= args.num_heads) words[t] = 0;
      }
      const Place to = place_of(i / kTokenUnits);
      storage.queries[to.slot][to.in_slot].units[head * 8 + (unit ^ (head % 8))] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  for (int i = thread; i < num_weights; i += threads) {
    const Weight weight = i == thread ? first_weight : load_weight(i);
    const Place to = place_of(i / kIndexMaxHeads);
    Token& token = storage.tokens[to.slot][to.in_slot];
    const int place = i % kIndexMaxHeads;
    reinterpret_cast<float*>(token.weights)[place] =
        place % 2 == 0 ? weight.value : 0.5f * weight.value;
    if (place == 0) token.end = min(weight.end, args.max_end);
  }
  sm90::fence_proxy_async();
}

/// Is this part over before two warps have fetched the queries of the next one? Then all warps but
/// those of the keys fetch its queries together, when the part before is done.
__device__ __forceinline__ bool is_short(const Part& part) {
  return part.tile_end - part.tile <= Traits::kShortPart;
}
constexpr int kKeyThreads = 32 * Traits::kKeyWarps;
constexpr int kOtherThreads = Traits::kThreads - kKeyThreads;

/// Waits until all threads but those of the keys have come. Meetings have parity 0, 1, 0, ... As at
/// the other mbarriers every thread arrives: that is what compute-sanitizer can follow, and neither
/// a named barrier nor an arrival of one lane for its warp.
__device__ __forceinline__ void meet(Storage& storage, uint32_t parity) {
  const uint32_t barrier = shared_address(&storage.together);
  sm90::mbarrier_arrive(barrier);
  sm90::mbarrier_wait(barrier, parity);
}

/// By kOtherThreads threads, beside their ordinary waiting for each other.
__device__ __forceinline__ void put_queries_together(const IndexLogitsArgs& args, Storage& storage,
                                                     int k, const Part& part, bool scores) {
  meet(storage, 1);  // the item before is done
  const int thread = static_cast<int>(threadIdx.x) - (scores ? 0 : kKeyThreads);
  put_queries(args, storage, k % Traits::kSlots, part, {}, thread, kOtherThreads);
  meet(storage, 0);
}

/// Queries of all items but the first; those of items before `placed` lie there already.
__device__ __forceinline__ void fetch_queries(const IndexLogitsArgs& args, Storage& storage,
                                              Walk walk, int placed, int thread) {
  constexpr int kSlots = Traits::kSlots;
  Item item;
  Part part;
  walk.next(args, storage, item, part);
  for (int k = 1; walk.next(args, storage, item, part); ++k) {
    const int slot = k % kSlots;
    if (k >= kSlots) {
      sm90::mbarrier_wait(shared_address(&storage.queries_empty[slot]), (k / kSlots - 1) & 1);
    }
    if (k >= placed && is_short(part)) {
      put_queries_together(args, storage, k, part, false);
    } else if (k >= placed) {
      put_queries(args, storage, slot, part, {}, thread, Traits::kQueryThreads);
    }
    sm90::mbarrier_arrive(shared_address(&storage.queries_full[slot]));
  }
}

// ---- what the scoring warpgroups do

/// A lane's part of a tile: rows g, g + 8 of its warp's 16; dims [16 t, 16 t + 16) and [64 + 16 t,
/// 64 + 16 t + 16).
struct KeyRegisters {
  uint32_t words[2][8];
  float scale;  // of row g (t even) or g + 8
};

__device__ __forceinline__ void load_keys(KeyRegisters& keys, const Stage& stage, int warp) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // Lanes of odd rows read the other half first: 8 lanes that are served together then find
  // different banks.
  const bool odd = (g & 1) != 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4* row = stage.values[16 * warp + 8 * r + g];
    const uint4 a = row[odd ? 4 + t : t], b = row[odd ? t : 4 + t];
    keys.words[r][0] = odd ? b.x : a.x, keys.words[r][4] = odd ? a.x : b.x;
    keys.words[r][1] = odd ? b.y : a.y, keys.words[r][5] = odd ? a.y : b.y;
    keys.words[r][2] = odd ? b.z : a.z, keys.words[r][6] = odd ? a.z : b.z;
    keys.words[r][3] = odd ? b.w : a.w, keys.words[r][7] = odd ? a.w : b.w;
  }
  keys.scale = stage.scales[16 * warp + 8 * (t & 1) + g];
}

/// Starts the products of a tile with the queries of one token (32 sums a lane) or of two
/// neighbours (64).
template <int kSums>
__device__ __forceinline__ void multiply(float (&dots)[kSums], const KeyRegisters& keys,
                                         const Queries& queries) {
  const uint32_t address = shared_address(queries.units);
  sm90::wgmma_fence();
#pragma unroll
  for (int s = 0; s < Traits::kSteps; ++s) {
    const uint32_t a0 = keys.words[0][2 * s], a1 = keys.words[1][2 * s];
    const uint32_t a2 = keys.words[0][2 * s + 1], a3 = keys.words[1][2 * s + 1];
    const uint64_t b = sm90::fp8_operand(address + 32 * s);
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

/// Scores of a tile for kCount tokens, 1 or 2: products, then the heads are folded.
template <int kCount>
__device__ __forceinline__ void score(const KeyRegisters& keys, const Queries* queries,
                                      const Token* tokens, int32_t row, float* logits,
                                      int64_t logits_stride) {
  const int t = threadIdx.x % 4;
  const bool odd = (t & 1) != 0, upper = (t & 2) != 0;
  float dots[32 * kCount];
  multiply(dots, keys, queries[0]);
  // What folding begins and ends with is on its way meanwhile.
  float4 weights[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) weights[k] = tokens[k].weights[0][t];
  const int32_t end = tokens[kCount == 2 && upper ? 1 : 0].end;
  wait_for(dots);
  float sums[kCount][2] = {};  // rows g, g + 8
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float4 w = weights[k];
      if (n < 3) weights[k] = tokens[k].weights[n + 1][t];
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
  if (kCount == 2) logits += upper ? logits_stride : 0;
  if (row < end && (kCount == 2 || !upper)) logits[row] = __fmul_rn(sum, keys.scale);
}

__device__ __forceinline__ void score_tiles(const IndexLogitsArgs& args, Storage& storage,
                                            Walk walk, int placed) {
  const int warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x % 128 / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Tile `turn` of the CTA's list, counted from 0, is warpgroup turn % kWarpgroups's.
  int32_t stage = warpgroup, turn = warpgroup, base = 0;
  uint32_t parity = 0;
  Item item;
  Part part;
  for (int k = 0; walk.next(args, storage, item, part); ++k) {
    const int slot = k % Traits::kSlots;
    if (k >= placed && is_short(part)) put_queries_together(args, storage, k, part, true);
    if (k > 0) {
      sm90::mbarrier_wait(shared_address(&storage.queries_full[slot]),
                          (k - 1) / Traits::kSlots & 1);
    }
    const int32_t tiles = uniform(part.tile_end - part.tile), count = uniform(part.count);
    const Queries* queries = storage.queries[slot];
    const Token* tokens = storage.tokens[slot];
    for (; turn < base + tiles; turn += Traits::kWarpgroups) {
      KeyRegisters keys;
      sm90::mbarrier_wait(shared_address(&storage.full[stage]), parity);
      load_keys(keys, storage.stages[stage], warp);
      // An arrival alone overtakes loads that wait behind the products' reads of shared memory; the
      // next copy then lands before them.
      sm90::fence_proxy_async();
      sm90::mbarrier_arrive(shared_address(&storage.empty[stage]));
      stage += Traits::kWarpgroups;
      if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;

      const int32_t row = (part.tile + turn - base) * Traits::kTile + 16 * warp + 8 * (t & 1) + g;
      float* logits = args.logits + part.first * args.logits_stride;
      int i = 0;
#pragma unroll 1
      for (; i + 1 < count; i += 2, logits += 2 * args.logits_stride)
        score<2>(keys, queries + i, tokens + i, row, logits, args.logits_stride);
      if (i < count) score<1>(keys, queries + i, tokens + i, row, logits, args.logits_stride);
    }
    base += tiles;
    sm90::mbarrier_arrive(shared_address(&storage.queries_empty[slot]));
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
      sm90::mbarrier_init(shared_address(&storage.queries_full[s]), Traits::kQueryThreads);
      sm90::mbarrier_init(shared_address(&storage.queries_empty[s]), 128 * Traits::kWarpgroups);
    }
    sm90::mbarrier_init(shared_address(&storage.together), kOtherThreads);
    sm90::fence_proxy_async();
  }
  follow_kernels_before();
  touch_likely_queries(args);
  const Walk walk = find_part(args, storage);
  if (walk.left == 0) return;

  // The first warps of the last warpgroup fetch keys; all others begin with the first queries, and
  // with the next ones where these are wanted soon.
  const int warpgroup = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x % 128 / 32);
  const bool scores = warpgroup < Traits::kWarpgroups;
  int placed = 0;
  if (scores || warp >= Traits::kKeyWarps) {
    const int thread = static_cast<int>(threadIdx.x) - (scores ? 0 : kKeyThreads);
    Walk first = walk;
    Item item;
    Part part{}, next{};
    first.next(args, storage, item, part);
    if (is_short(part)) first.next(args, storage, item, next);
    if (part.count + next.count == 1) {  // a unit a thread
      put_queries<1>(args, storage, 0, part, next, thread, kOtherThreads);
    } else {
      put_queries(args, storage, 0, part, next, thread, kOtherThreads);
    }
    placed = next.count > 0 ? 2 : 1;
    meet(storage, 0);
  }
  if (scores) {
    sm90::increase_registers<Traits::kScoreRegisters>();
    score_tiles(args, storage, walk, placed);
  } else {
    sm90::decrease_registers<Traits::kFetchRegisters>();
    if (warp < Traits::kKeyWarps) {
      fetch_keys(args, storage, walk, warp);
    } else {
      fetch_queries(args, storage, walk, placed, static_cast<int>(threadIdx.x) % 128 - kKeyThreads);
    }
  }
}

}  // namespace

void index_logits_sm90(const IndexLogitsParams& params, const OpContext& context) {
  constexpr int kTile = Traits::kTile;
  const int32_t rows = params.cache.rows_per_block;
  const bool runs = rows % kTile == 0 || (rows % 4 == 0 && kTile % rows == 0);
  if (params.cache.format != KvFormat::kIndexFp8 || !runs || !index_rows_aligned(params)) {
    return index_logits_sm80(params, context);
  }
  const IndexLogitsArgs args = index_logits_args(params);
  if (context.scratch->measuring() || args.num_tokens == 0 || args.max_end == 0) return;
  const int64_t most = int64_t{args.num_tokens} * ceil_div(args.max_end, kTile);
  const int64_t wanted =
      std::max(std::min(most, Traits::kEnough), ceil_div(most, int64_t{Traits::kWarpgroups}));
  const auto ctas = static_cast<unsigned>(std::min(Traits::kMultiprocessors, wanted));
  launch<sm90_index_logits_fp8>({dim3(ctas), Traits::kThreads, sizeof(Storage)},
                                stream_of(context.stream), args);
}

}  // namespace dsv4::nvidia
