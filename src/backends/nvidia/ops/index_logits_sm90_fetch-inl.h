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
        sm90::fence_proxy_async();  // after the loads of those that have read the place
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

/// E4M3 codes of two bf16 numbers.
__device__ __forceinline__ uint32_t codes_of(uint32_t pair) {
  return sm90::e4m3x2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
/// The head whose weight is at place i of Token::weights.
__device__ __forceinline__ int head_of_place(int i) {
  return i / 16 * 16 + i / 4 % 4 * 2 + i % 4 / 2 * 8 + i % 2;
}
__device__ __forceinline__ void put_weight(Token& token, int place, float weight) {
  reinterpret_cast<float*>(token.weights)[place] = place % 2 == 0 ? weight : 0.5f * weight;
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
  const auto load_weight = [&](int i) -> Weight {
    const int32_t token = place_of(i / kIndexMaxHeads).token,
                  head = head_of_place(i % kIndexMaxHeads);
    return {head < args.num_heads ? __ldg(args.weights + token * args.weights_stride + head) : 0.0f,
            __ldg(args.end + token)};
  };
  const int num_weights = tokens * kIndexMaxHeads;
  Weight first_weight{};  // beside the queries, not after them
  if (thread < num_weights) first_weight = load_weight(thread);

  // Unit u of a head, word t: four dims from 64 (u / 4) + 16 t + 4 (u % 4) on. Loads of two units
  // are on their way at once.
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
        words[t] = codes_of(v.x) | codes_of(v.y) << 16;
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
    put_weight(token, place, weight.value);
    if (place == 0) token.end = min(weight.end, args.max_end);
  }
  sm90::fence_proxy_async();
}

constexpr int kKeyThreads = 32 * Traits::kKeyWarps;
constexpr int kOtherThreads = Traits::kThreads - kKeyThreads;

/// Queries and weights of the item after the one that is scored, a token at a time by all threads
/// that score: asked for at one tile, put down at the next. What a thread copies it reads itself.
class NextItem {
 public:
  static constexpr int kThreads = 128 * Traits::kWarpgroups;

  /// Item k, `part` of it; none where it has no tokens.
  __device__ __forceinline__ NextItem(const IndexLogitsArgs& args, Storage& storage, int k,
                                      const Part& part)
      : args_(args), storage_(storage), k_(k), first_(part.first), count_(part.count) {}

  /// At a tile.
  __device__ __forceinline__ void advance() {
    if (put_ == count_) return;
    if (asked_ > put_) put();
    if (asked_ < count_) ask();
  }
  /// When there is no tile left.
  __device__ __forceinline__ void finish() {
    while (put_ < count_) advance();
  }

 private:
  static constexpr int kPieces = kIndexDim / 8;  // of a head, 16 bytes each

  __device__ __forceinline__ void ask() {
    const int thread = threadIdx.x;
    const int64_t token = first_ + asked_;
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int head = (i * kThreads + thread) / kPieces;
      sm80::copy_async_stream(shared_address(&storage_.pieces[i][thread]),
                              args_.q + token * args_.q_token_stride +
                                  min(head, args_.num_heads - 1) * args_.q_head_stride +
                                  thread % kPieces * 8,
                              head < args_.num_heads ? 16 : 0);
    }
    if (thread < kIndexMaxHeads) {
      const int head = head_of_place(thread);
      sm80::copy_async_4(
          shared_address(&storage_.weights[thread]),
          args_.weights + token * args_.weights_stride + min(head, args_.num_heads - 1),
          head < args_.num_heads ? 4 : 0);
      if (thread == 0) sm80::copy_async_4(shared_address(&storage_.end), args_.end + token, 4);
    }
    sm80::copy_async_commit();
    ++asked_;
  }

  __device__ __forceinline__ void put() {
    const int thread = threadIdx.x, slot = k_ % Traits::kSlots;
    sm80::copy_async_wait<0>();
    if (put_ == 0 && k_ >= Traits::kSlots) {  // the item that was there has been scored by all
      sm90::mbarrier_wait(shared_address(&storage_.queries_empty[slot]),
                          (k_ / Traits::kSlots - 1) & 1);
    }
    // Dims [8 i, 8 i + 8): word t of unit u has four from 64 (u / 4) + 16 t + 4 (u % 4) on.
    const int piece = thread % kPieces;
    const int unit = piece / 8 * 4 + piece % 2 * 2, word = piece % 8 / 2;
    Queries& queries = storage_.queries[slot][put_];
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int head = (i * kThreads + thread) / kPieces;
      const uint4 dims = storage_.pieces[i][thread];
      const auto put_word = [&](int u, uint32_t a, uint32_t b) {
        reinterpret_cast<uint32_t*>(&queries.units[head * 8 + (u ^ (head % 8))])[word] =
            codes_of(a) | codes_of(b) << 16;
      };
      put_word(unit, dims.x, dims.y);
      put_word(unit + 1, dims.z, dims.w);
    }
    Token& token = storage_.tokens[slot][put_];
    if (thread < kIndexMaxHeads) put_weight(token, thread, storage_.weights[thread]);
    if (thread == 0) token.end = min(storage_.end, args_.max_end);
    if (++put_ == count_) {
      sm90::fence_proxy_async();
      sm90::mbarrier_arrive(shared_address(&storage_.queries_full[slot]));
    }
  }

  const IndexLogitsArgs& args_;
  Storage& storage_;
  int k_, first_, count_;
  int asked_ = 0, put_ = 0;
};

}  // namespace dsv4::nvidia::sm90_logits
