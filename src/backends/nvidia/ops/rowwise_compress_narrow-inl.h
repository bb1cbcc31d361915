// The compressor's step on NVIDIA for narrow rows (indexer rows) of long steps: one launch, a lane
// group an entry (docs/kernels/rowwise_gpu.md).
//
// Tiling    Blocks [0, seqs): the entries of a sequence that pool rows of its ring, then the rows
//           that the ring takes. The others have some tokens each: they list the entries whose rows
//           are all of the step. A lane pools four channels of rows that it has copied itself; the
//           rows of its group's next entry are on their way meanwhile. Groups do not wait for each
//           other
// Budget    per entry of ratio 4: 8 KiB; some 1750 instructions, 925 of which pool
// Launch    four blocks a multiprocessor; the block of a ring is one chain of waits, some 6 us:
//           for long steps, where it is done before the others
// Contract  8 pooled rows at most, width at most 128
#pragma once
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/rowwise_compress-inl.h"

namespace dsv4::nvidia::compressor {

template <typename CacheRows>
struct CompressNarrow {
  static constexpr int kVectors = 2, kRows = 8, kLaneChannels = 4;
  static_assert(kVectors * gpu::kVectorElems == kLaneChannels * kGroupLanes);
  static constexpr int kThreads = 128, kGroups = kThreads / kGroupLanes;
  static constexpr int kMinBlocks = 4;
  static constexpr int kKept = 4;  // rows for the ring that a thread has on their way
  struct alignas(16) Lane {
    float at[kLaneChannels];
  };
  using Finish = EntryFinish<CacheRows, kVectors, 1>;
  struct Shared {
    Lane value[kRows][kThreads], score[kRows][kThreads];
    Lane ape[kRows][kGroupLanes];  // what scores of the step lack
    typename Finish::Shared entries[kGroups];
    Entry list[kThreads];
    int32_t count;
  };

  DSV4_DEVICE static int channel() { return kLaneChannels * group_lane(); }

  DSV4_DEVICE static void run(const CompressArgs& args, Shared& shared) {
    const auto weights = Finish::weights(args);
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const bool own = args.windows == 2 && k >= args.ratio;
      if (k < args.pooled_tokens() && channel() < args.width && group_idx() == k % kGroups) {
        fetch(&shared.ape[k][group_lane()], args.ape +
                                                (own ? k - args.ratio : k) * args.ape_stride +
                                                (own ? args.width : 0) + channel());
      }
    }
    sm80::copy_async_commit();
    follow_kernels_before();
    if (block_idx() < args.seqs) {
      pass_ring(args, block_idx(), weights, shared);
      return;
    }
    const int64_t begin = (block_idx() - args.seqs) * args.tokens_per_block;
    const int64_t limit = std::min<int64_t>(args.tokens, begin + args.tokens_per_block);
    for (int64_t from = begin; from < limit; from += kThreads) {
      list_entries(args, from, std::min<int64_t>(limit, from + kThreads), shared);
      const int count = shared.count;
      if (group_idx() < count) fetch_rows_of_step(args, shared.list[group_idx()], shared);
      sm80::copy_async_commit();
      for (int i = group_idx(); i < count; i += kGroups) {
        make_entry<true>(args, shared.list[i], weights, shared, [&] {
          if (i + kGroups < count) fetch_rows_of_step(args, shared.list[i + kGroups], shared);
        });
      }
    }
  }

  // ---- entries of the step

  /// Lists those of tokens [begin, end) whose rows are all of the step: the first row is of the
  /// same sequence.
  DSV4_DEVICE static void list_entries(const CompressArgs& args, int64_t begin, int64_t end,
                                       Shared& shared) {
    block_sync();  // the list before has been read
    if (thread_idx() == 0) shared.count = 0;
    const int back = args.pooled_tokens() - 1;
    const int64_t token = begin + thread_idx();
    const int64_t at = token < end ? token : begin, first = at < back ? at : at - back;
    const int32_t position = args.positions[at];
    const bool is_whole = args.token_to_seq[at] == args.token_to_seq[first] && token >= back;
    const bool emits = args.slots[at] >= 0 && token < end;
    sm80::copy_async_wait<0>();  // of ape
    block_sync();
    if (is_whole && emits) {
      const Entry entry{static_cast<int32_t>(token), position, position - back, 0};
      shared.list[gpu::atomic_add(&shared.count, 1)] = entry;
    }
    block_sync();
  }
  DSV4_DEVICE static void fetch_rows_of_step(const CompressArgs& args, const Entry& entry,
                                             Shared& shared) {
    if (channel() >= args.width) return;
    const int count = args.pooled_tokens(), first_own = args.windows == 2 ? args.ratio : kRows;
    const float* row =
        args.gates + int64_t{entry.token - (count - 1)} * args.gates_stride + channel();
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      fetch_row(args, shared, k, row + (k >= first_own ? args.width : 0));
      if (k + 1 < count) row += args.gates_stride;
    }
  }
  DSV4_DEVICE static void fetch_row(const CompressArgs& args, Shared& shared, int k,
                                    const float* value) {
    fetch(&shared.value[k][thread_idx()], value);
    fetch(&shared.score[k][thread_idx()], value + args.half());
  }

  /// By a group, whose rows of it are on their way; `fetch_next` sends for others.
  template <bool kOfStep, typename FetchNext>
  DSV4_DEVICE static void make_entry(const CompressArgs& args, const Entry& entry,
                                     const typename Finish::Weights& weights, Shared& shared,
                                     FetchNext fetch_next) {
    const int64_t slot = args.slots[entry.token];
    typename Finish::Shared& finish = shared.entries[group_idx()];
    group_sync();  // the entry before has been read
    Finish::prepare(args, entry.position, finish);
    sm80::copy_async_wait<0>();
    Lane score[kRows], value[kRows];
    load_rows<kOfStep>(args, entry, shared, score, value);
    fetch_next();
    sm80::copy_async_commit();
    if (channel() < args.width) gpu::store_as(finish.pooled + channel(), pool_rows(score, value));
    group_sync();
    if (slot >= 0) Finish::run(args, entry.token, slot, weights, finish);
  }
  template <bool kOfStep>
  DSV4_DEVICE static void load_rows(const CompressArgs& args, const Entry& entry,
                                    const Shared& shared, Lane (&score)[kRows],
                                    Lane (&value)[kRows]) {
    const int first_in_step = kOfStep ? 0 : entry.first_in_step(args);
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      value[k] = shared.value[k][thread_idx()];
      score[k] = shared.score[k][thread_idx()];
      if (k < first_in_step) continue;
      const Lane ape = shared.ape[k][group_lane()];
      DSV4_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) score[k].at[c] = score[k].at[c] + ape.at[c];
    }
    const int end = args.pooled_tokens();
    const int begin = kOfStep ? 0 : std::max(0, end - 1 - entry.position);
    leave_out_rows(score, value, begin, end);
  }

  // ---- the ring

  /// Two entries at most pool rows of it, a group each; then it may change.
  DSV4_DEVICE static void pass_ring(const CompressArgs& args, int64_t sequence,
                                    const typename Finish::Weights& weights, Shared& shared) {
    const int32_t begin = args.query_start[sequence], end = args.query_start[sequence + 1];
    const int32_t context = args.context_len[sequence], state_slot = args.state_slot[sequence];
    const int32_t position = context / args.ratio * args.ratio + (group_idx() + 1) * args.ratio - 1;
    const Entry entry{begin + position - context, position, context, state_slot};
    const bool pools = entry.token < end && entry.first_in_step(args) > 0;
    if (pools && channel() < args.width) {
      const PoolRows rows = entry.rows(args);
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k)
        fetch_row(args, shared, k, rows.row(args, k).value + channel());
    }
    sm80::copy_async_commit();
    sm80::copy_async_wait<1>();  // of ape
    block_sync();
    if (pools) make_entry<false>(args, entry, weights, shared, [] {});
    block_sync();
    keep_rows(args, end, std::min(args.ring_rows, end - begin), context + (end - begin),
              state_slot);
  }
  /// The last `count` rows of a sequence whose tokens and positions end before `end` and
  /// `position_end`.
  DSV4_DEVICE static void keep_rows(const CompressArgs& args, int32_t end, int count,
                                    int32_t position_end, int32_t state_slot) {
    const int half = args.half(), pieces = half / 4, step = kThreads / pieces;
    const int row = thread_idx() / pieces, column = 4 * (thread_idx() - row * pieces);
    if (row >= step) return;
    DSV4_UNROLL_BY(1)
    for (int first = row; first < count; first += kKept * step) {
      float4 value[kKept], score[kKept];
      DSV4_UNROLL
      for (int i = 0; i < kKept; ++i) {
        const int back = first + i * step + 1;
        if (back > count) continue;
        const float* gates = args.gates + int64_t{end - back} * args.gates_stride + column;
        const float* ape = args.ape + (position_end - back) % args.ratio * args.ape_stride + column;
        value[i] = gpu::load_as<float4>(gates);
        score[i] = gpu::load_as<float4>(gates + half);
        const auto add = gpu::load_as<float4>(ape);
        score[i].x = score[i].x + add.x, score[i].y = score[i].y + add.y;
        score[i].z = score[i].z + add.z, score[i].w = score[i].w + add.w;
      }
      DSV4_UNROLL
      for (int i = 0; i < kKept; ++i) {
        const int back = first + i * step + 1;
        if (back > count) continue;
        float* to = gpu::ring_of(args, state_slot) +
                    int64_t{(position_end - back) % args.ring_rows} * args.state_row_elems + column;
        gpu::store_as(to, value[i]);
        gpu::store_as(to + half, score[i]);
      }
    }
  }
};

}  // namespace dsv4::nvidia::compressor
