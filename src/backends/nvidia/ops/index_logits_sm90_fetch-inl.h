// sm90_index_logits_fp8 (index_logits_sm90a.cu): keys into the ring, queries and weights into their
// places.
#pragma once
#include "backends/nvidia/ops/index_logits_sm90-inl.h"

namespace dsv4::nvidia::sm90_logits {

/// Keys of a CTA's tiles, in order, into the ring; tile i by warp i % kKeyWarps. A copy takes a
/// thread some hundred clocks from its addresses on, so these are reckoned by all lanes before.
__device__ __forceinline__ void fetch_keys(const LaunchArgs& launch, Storage& storage, Walk walk,
                                           int warp) {
  constexpr int kTile = Traits::kTile, kKeyWarps = Traits::kKeyWarps;
  const IndexLogitsArgs& args = launch.args;
  const int lane = threadIdx.x % 32;
  // A run: rows of one page within a tile, a box of the map. A lane has every 32nd run of the
  // warp's tiles. Powers of two: a division is a hundred clocks before the first key.
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
    // The next item's pages are asked for meanwhile.
    const auto touch_next = [&] {
      if (walk.left == 0 || !has_few_tokens(args)) return;
      const Item& next = storage.items[walk.items + walk.token];
      if (lane * args.rows_per_block < next.longest)
        sm90::touch(args.table + next.seq * args.table_stride + lane);
    };
    for (int32_t begin = 0; begin < runs; begin += 32) {
      const int64_t block = next_block;
      next_block = block_of(begin + 32 + lane);
      const int32_t entry = entry_of(begin + lane), in_tile = entry % kTile;
      const int32_t row =
          args.rows_shift >= 0 ? entry & (args.rows_per_block - 1) : entry % args.rows_per_block;
      const std::byte* scales = args.cache + block * args.block_stride_bytes +
                                int64_t{args.rows_per_block} * kIndexDim + row * 4;
      const int32_t left = item.longest - entry;
      const auto copy = [&](int32_t to, bool starts) {
        const uint32_t full = shared_address(&storage.full[to]);
        if (starts) {
          const int32_t boxes = min(tile_runs, (left + run_rows - 1) >> (6 - runs_shift));
          sm90::mbarrier_arrive_expecting(full, boxes * run_rows * (kIndexDim + 4));
        }
        if (left > 0) {
          sm90::copy_box(shared_address(storage.keys[to].codes[in_tile]), launch.keys, 0, row,
                         static_cast<int>(block), full);
          sm90::copy_bytes(shared_address(&storage.scales[to][in_tile]), scales, run_rows * 4,
                           full);
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
      if (begin == 0) touch_next();
#pragma unroll 1
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

/// Queries, weights and lengths of a CTA's items, in order, and the end of the list; by a warp.
__device__ __forceinline__ void fetch_queries(const LaunchArgs& launch, Storage& storage,
                                              Walk walk) {
  const IndexLogitsArgs& args = launch.args;
  const int lane = threadIdx.x % 32;
  sm90::RingPlace<Traits::kSlots> place;
  for (bool is_item = true; is_item;) {
    Item item;
    Part part;
    is_item = walk.next(args, storage, item, part);
    if (!is_item) part = Part{};
    Slot& slot = storage.slots[place.stage];
    const uint32_t full = shared_address(&storage.queries_full[place.stage]);
    sm90::mbarrier_wait(shared_address(&storage.queries_empty[place.stage]), place.phase ^ 1);
    if (lane == 0) {
      slot.part = part;
      sm90::mbarrier_arrive_expecting(full, part.count * static_cast<uint32_t>(sizeof(Queries)));
      for (int k = 0; k < part.count; ++k) {
        sm90::copy_box(shared_address(&storage.queries[place.stage][k]), launch.queries, 0, 0,
                       part.first + k, full);
      }
    }
    for (int k = 0; k < part.count; ++k) {
      const float* weights = args.weights + (part.first + k) * args.weights_stride;
      for (int head = lane; head < kIndexMaxHeads; head += 32) {
        sm80::copy_async_4(shared_address(&slot.weights[k][head]),
                           weights + min(head, args.num_heads - 1), head < args.num_heads ? 4 : 0);
      }
    }
    if (lane < part.count)
      sm80::copy_async_4(shared_address(&slot.end[lane]), args.end + part.first + lane, 4);
    sm90::copy_async_arrive(full);
    place.advance();
  }
}

}  // namespace dsv4::nvidia::sm90_logits
