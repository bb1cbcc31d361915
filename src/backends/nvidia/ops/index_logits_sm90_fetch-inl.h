// sm90_index_logits_fp8 (index_logits_sm90a.cu): keys into the ring, queries and weights into their
// places.
#pragma once
#include "backends/nvidia/ops/index_logits_sm90-inl.h"

namespace dsv4::nvidia::sm90_logits {

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

}  // namespace dsv4::nvidia::sm90_logits
