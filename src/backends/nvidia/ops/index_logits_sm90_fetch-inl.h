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
  int32_t unused = Traits::kStages / kKeyWarps;  // places of this warp
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
      // Whole groups of 4 rows: their scales are 16 bytes.
      const int32_t left = (item.longest - entry + 3) / 4 * 4;
      const auto rows = static_cast<uint32_t>(min(run_rows, left));
      const auto tile_rows = static_cast<uint32_t>(min(kTile, left));
      const std::byte* page = args.cache + block * args.block_stride_bytes;
      const std::byte* values = page + int64_t{row} * kIndexDim;
      const std::byte* scales = page + int64_t{args.rows_per_block} * kIndexDim + row * 4;
      const auto copy = [&](int32_t to_stage, bool starts, bool was_used) {
        const uint32_t full = shared_address(&storage.full[to_stage]);
        Stage& to = storage.stages[to_stage];
        // After the loads of those that have read the place. Waits for loads of this thread, too.
        if (was_used) sm90::fence_proxy_async();
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
        if (lane < i)
          copy(stage + (lane >> runs_shift) * kKeyWarps, (lane & (tile_runs - 1)) == 0, false);
        __syncwarp();
        unused -= tiles_now;
        stage += tiles_now * kKeyWarps;
        if (stage >= Traits::kStages) stage -= Traits::kStages, parity ^= 1;
      }
      if (begin == 0) touch_next();
#pragma unroll 1
      for (; i < min(32, runs - begin); ++i) {
        const bool starts = (i & (tile_runs - 1)) == 0;  // `begin` is a multiple of 32
        if (starts) sm90::mbarrier_wait(shared_address(&storage.empty[stage]), parity);
        if (lane == i) copy(stage, starts, unused <= 0);
        __syncwarp();
        if (((i + 1) & (tile_runs - 1)) == 0) {
          unused -= 1;
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
/// What of a token's queries a scoring thread brings: pieces of kHeads heads apart, whose places
/// are swizzled alike.
class QueryShare {
 public:
  static constexpr int kThreads = 128 * Traits::kWarpgroups, kHeads = kThreads / kHeadPieces;
  static constexpr int kPieces = kTokenPieces / kThreads;
  static_assert(kHeads % 8 == 0 && kIndexMaxHeads % kHeads == 0);

  __device__ __forceinline__ explicit QueryShare(const IndexLogitsArgs& args) : args_(args) {
    const int head = static_cast<int>(threadIdx.x) / kHeadPieces, piece = threadIdx.x % kHeadPieces;
    from_ = args.q + min(head, args.num_heads - 1) * args.q_head_stride + piece * 8;
    // Word t of unit u has four dims from 64 (u / 4) + 16 t + 4 (u % 4) on; the next four are those
    // of unit u + 1.
    const int unit = piece / 8 * 4 + piece % 2 * 2, word = piece % 8 / 2;
    to_ = (head * 8 + (unit ^ (head % 8))) * 16 + word * 4;
  }
  __device__ __forceinline__ bool has(int i) const {
    return i * kHeads + static_cast<int>(threadIdx.x) / kHeadPieces < args_.num_heads;
  }
  /// Only to be read where there is such a head.
  __device__ __forceinline__ const uint16_t* piece(int64_t token, int i) const {
    return from_ + token * args_.q_token_stride + i * kHeads * args_.q_head_stride;
  }
  __device__ __forceinline__ void put(Queries& queries, int i, const uint4& dims) const {
    const uint32_t to = shared_address(queries.units) + to_ + i * kHeads * kIndexDim;
    sm90::store_shared(to, codes_of(dims.x) | codes_of(dims.y) << 16);
    sm90::store_shared(to ^ 16, codes_of(dims.z) | codes_of(dims.w) << 16);
  }

 private:
  const IndexLogitsArgs& args_;
  const uint16_t* from_;
  uint32_t to_;
};

/// The head whose weight is at place i of Token::weights.
__device__ __forceinline__ int head_of_place(int i) {
  return i / 16 * 16 + i / 4 % 4 * 2 + i % 4 / 2 * 8 + i % 2;
}
__device__ __forceinline__ void put_weight(Token& token, int place, float weight) {
  reinterpret_cast<float*>(token.weights)[place] = place % 2 == 0 ? weight : 0.5f * weight;
}

/// Queries and weights of the first item, and of the second one if it has tokens, by the threads
/// that score.
__device__ __forceinline__ void put_queries(const IndexLogitsArgs& args, Storage& storage,
                                            const QueryShare& share, const Part& part,
                                            const Part& next) {
  constexpr int kBatch = 4;  // tokens whose queries are on their way at once
  const int thread = threadIdx.x, tokens = part.count + next.count;
  struct Place {
    int32_t token, slot, in_slot;
  };
  const auto place_of = [&](int i) -> Place {
    return i < part.count ? Place{part.first + i, 0, i}
                          : Place{next.first + i - part.count, 1, i - part.count};
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

#pragma unroll 1
  for (int begin = 0; begin < tokens; begin += kBatch) {
    uint4 dims[kBatch][QueryShare::kPieces];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b >= tokens) break;
#pragma unroll
      for (int i = 0; i < QueryShare::kPieces; ++i) {
        dims[b][i] = uint4{};
        if (share.has(i)) {
          dims[b][i] =
              __ldg(reinterpret_cast<const uint4*>(share.piece(place_of(begin + b).token, i)));
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b >= tokens) break;
      const Place to = place_of(begin + b);
#pragma unroll
      for (int i = 0; i < QueryShare::kPieces; ++i)
        share.put(storage.queries[to.slot][to.in_slot], i, dims[b][i]);
    }
  }
  for (int i = thread; i < num_weights; i += QueryShare::kThreads) {
    const Weight weight = i == thread ? first_weight : load_weight(i);
    const Place to = place_of(i / kIndexMaxHeads);
    Token& token = storage.tokens[to.slot][to.in_slot];
    const int place = i % kIndexMaxHeads;
    put_weight(token, place, weight.value);
    if (place == 0) token.end = min(weight.end, args.max_end);
  }
  sm90::fence_proxy_async();
}

/// Queries and weights of the item after the one that is scored, a token at a time by all threads
/// that score: asked for at one tile, put down at the next. What a thread copies it reads itself.
class NextItem {
 public:
  __device__ __forceinline__ NextItem(const IndexLogitsArgs& args, Storage& storage,
                                      const QueryShare& share)
      : args_(args), storage_(storage), share_(share) {}

  /// Item k, `part` of it; none where it has no tokens.
  __device__ __forceinline__ void begin(int k, const Part& part) {
    k_ = k, first_ = part.first, count_ = part.count, asked_ = put_ = 0;
  }
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
  __device__ __forceinline__ void ask() {
    const int thread = threadIdx.x;
    const int64_t token = first_ + asked_;
#pragma unroll
    for (int i = 0; i < QueryShare::kPieces; ++i) {
      sm80::copy_async_stream(shared_address(&storage_.pieces[i * QueryShare::kThreads + thread]),
                              share_.piece(token, share_.has(i) ? i : 0), share_.has(i) ? 16 : 0);
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
#pragma unroll
    for (int i = 0; i < QueryShare::kPieces; ++i) {
      share_.put(storage_.queries[slot][put_], i,
                 storage_.pieces[i * QueryShare::kThreads + thread]);
    }
    Token& token = storage_.tokens[slot][put_];
    if (thread < kIndexMaxHeads) {
      put_weight(token, thread, storage_.weights[thread]);
      if (thread == 0) token.end = min(storage_.end, args_.max_end);
    }
    if (++put_ == count_) {
      sm90::fence_proxy_async();
      sm90::mbarrier_arrive(shared_address(&storage_.queries_full[slot]));
    }
  }

  const IndexLogitsArgs& args_;
  Storage& storage_;
  const QueryShare& share_;
  int k_ = 0, first_ = 0, count_ = 0;
  int asked_ = 0, put_ = 0;
};

}  // namespace dsv4::nvidia::sm90_logits
