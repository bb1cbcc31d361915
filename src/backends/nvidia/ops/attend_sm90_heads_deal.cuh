// Which items, or blocks of items, a CTA of sm90_attend_heads has.
//
// Items are dealt out in turn where that is fair. Where it is not (148 items for 132 CTAs, lists of
// different lengths), blocks are: all blocks of all items in a row, cut into equal pieces. An item
// that is cut has its first blocks in one CTA, which does them before anything else, and the others
// in another one, which does them after everything else and goes on with the very sums that the
// first one left (UnfinishedItem), so that no bit depends on the cut. No piece is shorter than an
// item, so that the first blocks are done by the time that the others are wanted.
//
// A CTA waits for the one before it in the grid, which waits for nobody until it has handed over.
// So not all CTAs need run at once, but those before one that runs must have started. CUDA does not
// promise that; every Hopper GPU so far starts CTAs of a grid without clusters by number. Numbers
// drawn at the start instead would need a counter that begins at 0: scratch holds what the last
// kernel left there, clearing it is a launch of a microsecond, and streams would share a counter
// that belongs to the device.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_heads.h"
#include "backends/nvidia/ops/attend_sm90_heads_traits.h"

namespace dsv4::nvidia::sm90_attend_heads {

using namespace sm80;  // NOLINT: kernel code, not included by others
using namespace sm90;  // NOLINT: kernel code, not included by others

constexpr int kBlockRows = 64;

/// A token's chain, or nothing.
struct Item {
  int32_t index;  // -1: none
  int32_t token, chain;
};

__device__ __forceinline__ Item item_of(const AttendSm90Args& args, int index) {
  const int chain = args.chain_items.divide(index);
  return {index, index - chain * args.chain_items.divisor, chain};
}

/// Items dealt out in turn.
__device__ __forceinline__ Share share_of_items(const AttendSm90Args& args) {
  return {static_cast<int32_t>(blockIdx.x), args.num_items, static_cast<int32_t>(gridDim.x), 0, 0};
}

/// The item after `index` of a share that has rows to see (chain 0: always). Whole warps: lanes
/// look at 32 items at once.
__device__ __forceinline__ Item next_item(const AttendSm90Args& args, const Share& share,
                                          int index) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  for (index += share.stride; index < share.end; index += 32 * share.stride) {
    const int looked_at = index + lane * share.stride;
    bool has_work = looked_at < share.end;
    if (has_work) {
      const Item item = item_of(args, looked_at);
      if (item.chain > 0) {
        const RowSource& rows = args.attend.compressed;
        const int rows_per_chain = args.attend.blocks_per_chain * kBlockRows;
        const int begin = rows.kind == RowSource::kRange ? __ldg(rows.begin + item.token) : 0;
        const int end = __ldg(rows.end + item.token);
        has_work = begin < end && end > item.chain * rows_per_chain &&
                   begin < (item.chain + 1) * rows_per_chain;
      }
    }
    const uint32_t found = __ballot_sync(~0u, has_work);
    if (found != 0) return item_of(args, index + (__ffs(found) - 1) * share.stride);
  }
  return {-1, 0, 0};
}

/// Asks for the numbers of a token, which come to the caches. By a warp.
__device__ __forceinline__ void ask_for_numbers(const AttendSm90Args& args, int token, int lane) {
  const AttendArgs& attend = args.attend;
  const int32_t* from = attend.token_to_seq;
  if (lane == 1) from = attend.window.begin;
  if (lane == 2) from = attend.window.end;
  if (lane == 3) from = attend.compressed.begin;
  if (lane == 4) from = attend.compressed.end;
  if (lane < 5 && from != nullptr) touch(from + token);
}

/// Blocks of an item as the roles go through them: a token without rows has one.
__device__ __forceinline__ int blocks_of_item(const AttendSm90Args& args, int index) {
  const Item item = item_of(args, index);
  const TokenBlocks token = token_blocks<kBlockRows>(args.attend, item.token);
  return max(chain_blocks(args.attend, token, item.chain).count, item.chain == 0 ? 1 : 0);
}

/// Blocks of all items, where tiles will be. By all threads.
template <typename Traits>
__device__ __forceinline__ void count_blocks(const AttendSm90Args& args,
                                             SharedStorage<Traits>& shared) {
  static_assert(kMaxDealtItems * 4 <= sizeof(shared.rows));
  auto* counts = reinterpret_cast<int32_t*>(shared.rows);
  for (int item = static_cast<int>(threadIdx.x); item < args.num_items; item += Traits::kThreads) {
    counts[item] = blocks_of_item(args, item);
  }
}

/// Deals out blocks that have been counted, or items where blocks would save next to nothing. By a
/// warp; what it finds is in `shared.share`.
template <typename Traits>
__device__ __forceinline__ void deal_blocks(const AttendSm90Args& args,
                                            SharedStorage<Traits>& shared) {
  // What cuts cost, in blocks: sums out and in.
  constexpr int kCut = 1;
  const auto* counts = reinterpret_cast<const int32_t*>(shared.rows);
  const int lane = static_cast<int>(threadIdx.x) & 31, num_ctas = static_cast<int>(gridDim.x);
  const int of_lane = div_up(args.num_items, 32);
  const int first = min(lane * of_lane, args.num_items);
  const int last = min(first + of_lane, args.num_items);
  int sum = 0, longest = 0;
  for (int item = first; item < last; ++item) {
    sum += counts[item];
    longest = max(longest, counts[item]);
  }
  int before = sum;  // and its own
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int of_lower = __shfl_up_sync(~0u, before, distance);
    if (lane >= distance) before += of_lower;
  }
  const int total = __shfl_sync(~0u, before, 31);
  before -= sum;
  longest = __reduce_max_sync(~0u, longest);
  const int piece = max(div_up(total, num_ctas), longest);
  if (div_up(args.num_items, num_ctas) * longest - piece <= kCut) {
    if (lane == 0) shared.share = share_of_items(args);
    return;
  }
  // In reverse: who goes on with an item is the CTA after the one that begins it.
  const int begin = (num_ctas - 1 - static_cast<int>(blockIdx.x)) * piece;
  const int end = min(begin + piece, total);
  if (begin >= total) {
    if (lane == 0) shared.share = {0, 0, 1, 0, 0};
    return;
  }
  const auto holds = [&](int block) { return before <= block && block < before + sum; };
  if (!holds(begin) && !holds(end - 1)) return;
  for (int item = first; item < last; ++item) {
    const int after = before + counts[item];
    if (before <= begin && begin < after) {
      shared.share.begin = item;
      shared.share.stride = 1;
      shared.share.first_blocks = before < begin ? after - begin : 0;
    }
    if (before < end && end <= after) {
      shared.share.end = item + 1;
      shared.share.last_blocks = end < after ? end - before : 0;
    }
    before = after;
  }
}

// ---- items that are handed over

template <int kHeads>
__device__ __forceinline__ UnfinishedItem<kHeads>& unfinished_of(const HandOvers& hand_overs,
                                                                 int cta) {
  return reinterpret_cast<UnfinishedItem<kHeads>*>(hand_overs.items)[cta];
}

/// A thread's values of all heads and dims, every 128th of `to`.
template <int kHeads>
__device__ __forceinline__ void store_values(float4* to, const float (&o)[8][kHeads / 2]) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float* of = &o[i / (kHeads / 8)][i % (kHeads / 8) * 4];
    __stcg(to + i * 128, make_float4(of[0], of[1], of[2], of[3]));
  }
}

/// By the output role, with the sums of a block, the last part of whose tile it gives back;
/// barrier_sync(barrier) is its own.
template <typename Traits>
__device__ __forceinline__ void hand_over(const HandOvers& hand_overs,
                                          SharedStorage<Traits>& shared, int block, int barrier,
                                          int thread, float sum,
                                          const float (&o)[8][Traits::kHeads / 2]) {
  constexpr int kHeads = Traits::kHeads;
  auto& item = unfinished_of<kHeads>(hand_overs, static_cast<int>(blockIdx.x));
  if (thread < kHeads) __stcg(&item.reference[thread], shared.reference[block & 1][thread]);
  const auto last = TilePart<Traits>::last_of(block);
  mbarrier_arrive(shared_address(&shared.barriers.empty[last.slot]));
  __stcg(&item.sums[thread], sum);
  store_values<kHeads>(&item.values[0][thread], o);
  barrier_sync(barrier, 128);
  if (thread == 0) store_release_64(&item.mark, hand_overs.mark);
}

/// By a warp: waits for the item, and takes its mark away; `reference` becomes that of all heads.
template <typename Traits>
__device__ __forceinline__ void wait_for_item(const HandOvers& hand_overs, int lane,
                                              float (&reference)[Traits::kHeads]) {
  auto& item = unfinished_of<Traits::kHeads>(hand_overs, static_cast<int>(blockIdx.x) - 1);
  if (lane == 0) take_mark(&item.mark, hand_overs.mark);
  __syncwarp();
  if (lane < Traits::kHeads) reference[lane] = __ldcg(&item.reference[lane]);
}

/// By the output role, when it knows that somebody has waited.
template <typename Traits>
__device__ __forceinline__ void take_over(const HandOvers& hand_overs, int thread, float& sum,
                                          float (&o)[8][Traits::kHeads / 2]) {
  constexpr int kHeads = Traits::kHeads;
  const auto& item = unfinished_of<kHeads>(hand_overs, static_cast<int>(blockIdx.x) - 1);
  sum = __ldcg(&item.sums[thread]);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float4 of = __ldcg(&item.values[i][thread]);
    float* to = &o[i / (kHeads / 8)][i % (kHeads / 8) * 4];
    to[0] = of.x;
    to[1] = of.y;
    to[2] = of.z;
    to[3] = of.w;
  }
}

}  // namespace dsv4::nvidia::sm90_attend_heads
