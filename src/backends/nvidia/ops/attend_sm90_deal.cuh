// How the blocks of sm90_attend's items are dealt out where items fill the multiprocessors badly
// (148 items for 132 CTAs): all CTAs get the same share of them, in order. An item that lies in two
// shares is cut: its first blocks are in one CTA, which does them before anything else, and the
// others in the next one, which does them after everything else and goes on with the very sums that
// the first one left (HandOver), so that no bit depends on the cut. Where items are cut follows
// from their number and the length of the longest one, not from lengths that the host does not
// know: a list is cut at that share of its own blocks.
//
// A CTA waits for the one before it in the grid, which waits for nobody until it has handed over:
// not all CTAs need run at once, but those before one that runs must have started (why that holds:
// attend_sm90_heads_deal.cuh). Marks of a launch say that a hand-over is there; who has waited for
// one takes it away, so that a captured launch finds none of its last run.
#pragma once
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/attend_sm90_traits.h"

namespace dsv4::nvidia::sm90_attend {

using namespace sm90;  // NOLINT: kernel code, not included by others

/// Of `blocks` blocks those that come before a cut at `share` num_ctas-ths. Never all of them: sums
/// that are complete must not go through a further block, even one without rows.
__device__ __forceinline__ int blocks_before_cut(int blocks, int share, int num_ctas) {
  return max(0, min(blocks - 1, (blocks * share + num_ctas / 2) / num_ctas));
}

/// This CTA's share.
__device__ __forceinline__ DealtShare dealt_share(const AttendSm90Args& args) {
  constexpr int kFewest = 2;  // blocks that are worth a hand-over
  const int num_ctas = static_cast<int>(gridDim.x), blocks = args.dealt_blocks;
  DealtShare out;
  // An item at a limit of the share is cut, or belongs wholly to one of both CTAs.
  const auto find_limit = [&](int at, int& cut_item, int& cut_share) {
    const int item = at / num_ctas;
    cut_share = at - item * num_ctas;
    const int before = cut_share == 0 ? 0 : blocks_before_cut(blocks, cut_share, num_ctas);
    const bool is_cut = before >= kFewest && blocks - before >= kFewest;
    cut_item = is_cut ? item : -1;
    return item + (!is_cut && 2 * before >= blocks ? 1 : 0);  // the first item behind the limit
  };
  const int begin = static_cast<int>(blockIdx.x) * args.num_items;
  out.first = find_limit(begin, out.tail, out.tail_share);
  out.past = find_limit(begin + args.num_items, out.head, out.head_share);
  if (out.tail >= 0) ++out.first;
  return out;
}

// ---- items that are handed over, by roles; `barrier` is one of the 128 threads of a role

/// When all threads have stored what they leave.
__device__ __forceinline__ void mark_hand_over(uint64_t* to, uint64_t mark, int barrier) {
  barrier_sync(barrier, 128);
  if ((threadIdx.x & 127) == 0) store_release_64(to, mark);
}
__device__ __forceinline__ void wait_for_hand_over(uint64_t* at, uint64_t mark, int barrier) {
  if ((threadIdx.x & 127) == 0) take_mark(at, mark);
  barrier_sync(barrier, 128);
}

/// Reference maxima and sums of the S role's threads.
__device__ __forceinline__ void hand_over_sums(const AttendSm90Args& args, const float (&max)[2],
                                               const float (&sum)[2]) {
  HandOver& to = args.hand_overs[blockIdx.x];
  __stcg(&to.sums[threadIdx.x & 127], make_float4(max[0], max[1], sum[0], sum[1]));
  mark_hand_over(&to.marks[2], args.mark, kScoreBarrier);
}
__device__ __forceinline__ void take_over_sums(const AttendSm90Args& args, float (&max)[2],
                                               float (&sum)[2]) {
  HandOver& from = args.hand_overs[blockIdx.x - 1];
  wait_for_hand_over(&from.marks[2], args.mark, kScoreBarrier);
  const float4 x = __ldcg(&from.sums[threadIdx.x & 127]);
  max[0] = x.x;
  max[1] = x.y;
  sum[0] = x.z;
  sum[1] = x.w;
}

/// Values of an output role.
template <typename Value>
__device__ __forceinline__ void hand_over_values(const AttendSm90Args& args, int half,
                                                 const Value& o) {
  HandOver& to = args.hand_overs[blockIdx.x];
  float4* values = &to.values[half][0][threadIdx.x & 127];
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    __stcg(values + k * 128, make_float4(o(4 * k), o(4 * k + 1), o(4 * k + 2), o(4 * k + 3)));
  }
  mark_hand_over(&to.marks[half], args.mark, kOutputBarrier + half);
}
template <typename Value>
__device__ __forceinline__ void take_over_values(const AttendSm90Args& args, int half, Value& o) {
  HandOver& from = args.hand_overs[blockIdx.x - 1];
  wait_for_hand_over(&from.marks[half], args.mark, kOutputBarrier + half);
  const float4* values = &from.values[half][0][threadIdx.x & 127];
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    const float4 x = __ldcg(values + k * 128);
    o(4 * k) = x.x;
    o(4 * k + 1) = x.y;
    o(4 * k + 2) = x.z;
    o(4 * k + 3) = x.w;
  }
}

}  // namespace dsv4::nvidia::sm90_attend
