// The compressor's step on NVIDIA (rowwise_compress.cu): what a block has to do, rows on their way
// to it, the end of an entry, rows that the ring keeps.
#pragma once
#include <bit>

#include "backends/gpu/compress.h"
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/memory.h"

namespace dsv4::nvidia::compressor {

using gpu::Access;
using gpu::block_idx;
using gpu::block_sync;
using gpu::group_idx;
using gpu::group_lane;
using gpu::group_sync;
using gpu::kGroupLanes;
using gpu::PoolRows;
using gpu::PoolSum;
using gpu::Row;
using gpu::shuffle;
using gpu::thread_idx;

struct CompressArgs : gpu::CompressArgs {
  int32_t look_tokens;              // that CompressPool looks at at once
  int32_t entry_tokens;             // of a block of entries of CompressFinish
  int32_t seqs, ring_rows_per_seq;  // what the ring may have to take
};

// ---- what a block has to do

/// An entry of this step, by its last token.
struct Entry {
  int32_t token, position, context, state_slot;

  DSV4_DEVICE PoolRows rows(const CompressArgs& args) const {
    return PoolRows::of(args, {position, context, token - (position - context), state_slot});
  }
  /// Pooled rows from this one on are of the step, those before of the ring.
  DSV4_DEVICE int first_in_step(const CompressArgs& args) const {
    return args.pooled_tokens() - 1 - (position - context);
  }
};

/// The entries that up to kTokens tokens complete, kEntries of them at most.
template <int kThreads, int kTokens, int kEntries = kTokens>
struct EntryList {
  static constexpr int kLooks = kTokens / kThreads;
  static_assert(kLooks * kThreads == kTokens);
  Entry entries[kEntries];
  int32_t count;

  /// By all threads, all tokens at once, as every answer of the plan is a trip to memory.
  DSV4_DEVICE void find(const CompressArgs& args, int64_t begin, int64_t end) {
    block_sync();  // the list before has been read
    if (thread_idx() == 0) count = 0;
    int32_t sequence[kLooks], position[kLooks];
    bool emits[kLooks];
    DSV4_UNROLL
    for (int i = 0; i < kLooks; ++i) {
      const int64_t token = begin + i * kThreads + thread_idx();
      const int64_t at = token < end ? token : begin;
      sequence[i] = args.token_to_seq[at], position[i] = args.positions[at];
      emits[i] = args.slots[at] >= 0 && token < end;
    }
    block_sync();
    DSV4_UNROLL
    for (int i = 0; i < kLooks; ++i) {
      if (!emits[i]) continue;
      const auto token = static_cast<int32_t>(begin) + i * kThreads + thread_idx();
      const int32_t context = args.context_len[sequence[i]], slot = args.state_slot[sequence[i]];
      entries[gpu::atomic_add(&count, 1)] = {token, position[i], context, slot};
    }
    block_sync();
  }
};

/// 16 bytes, or 8, on their way to shared memory.
template <int kBytes = 16>
DSV4_DEVICE void fetch(void* to, const float* from) {
  if constexpr (kBytes == 16) {
    sm80::copy_async_stream(sm80::shared_address(to), from, 16);
  } else {
    static_assert(kBytes == 8);
    sm90::copy_async_8(sm80::shared_address(to), from, 8);
  }
}

/// From L2, which the kernels before have written to when this one may start.
template <typename T>
DSV4_DEVICE T load_fresh(const void* from) {
  return __ldcg(static_cast<const T*>(from));
}

/// The row of the ring that takes the row of a token of this position.
DSV4_DEVICE float* ring_row(const CompressArgs& args, int32_t state_slot, int32_t position) {
  return gpu::ring_of(args, state_slot) + int64_t{position % args.ring_rows} * args.state_row_elems;
}
/// By kLanes lanes, of which this is `lane`, kBatch times 16 bytes each at once. `ring_row_of` says
/// where to once rows are on their way, or null: nowhere.
template <int kLanes, int kBatch, typename RingRowOf>
DSV4_DEVICE void keep_row(const CompressArgs& args, int64_t token, int32_t position, int lane,
                          RingRowOf ring_row_of) {
  const float* gates = args.gates + token * args.gates_stride;
  const float* ape = args.ape + int64_t{position % args.ratio} * args.ape_stride;
  const int half = args.half();
  for (int first = 4 * lane; first < half; first += kBatch * 4 * kLanes) {
    float4 value[kBatch], score[kBatch];
    DSV4_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int c = first + i * 4 * kLanes;
      if (c >= half) continue;
      value[i] = load_fresh<float4>(gates + c);
      score[i] = load_fresh<float4>(gates + half + c);
      const float4 add = load_fresh<float4>(ape + c);
      score[i].x = score[i].x + add.x, score[i].y = score[i].y + add.y;
      score[i].z = score[i].z + add.z, score[i].w = score[i].w + add.w;
    }
    float* const to = ring_row_of();
    if (to == nullptr) return;
    DSV4_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int c = first + i * 4 * kLanes;
      if (c >= half) continue;
      gpu::store_as(to + c, value[i]);
      gpu::store_as(to + half + c, score[i]);
    }
  }
}

/// Where every sequence has one token: where its row goes. Padding tokens claim sequence 0 but lie
/// after its one: nowhere.
struct KeptToken {
  int32_t position, state_slot, sequence_end;

  DSV4_DEVICE static KeptToken of(const CompressArgs& args, int64_t token) {
    const int32_t sequence = args.token_to_seq[token];
    return {args.positions[token], args.state_slot[sequence], args.query_start[sequence + 1]};
  }
  DSV4_DEVICE float* to(const CompressArgs& args, int64_t token) const {
    return token < sequence_end ? ring_row(args, state_slot, position) : nullptr;
  }
};
/// All channels of tokens, which a block looks at one by one.
template <int kThreads>
DSV4_DEVICE void keep_tokens(const CompressArgs& args, int64_t begin, int64_t end) {
  DSV4_UNROLL_BY(1)
  for (int64_t t = begin; t < end; ++t) {
    const KeptToken token = KeptToken::of(args, t);
    keep_row<kThreads, 2>(args, t, token.position, thread_idx(), [&] { return token.to(args, t); });
  }
}

// ---- an entry

/// From the pooled row to the cache, by kGroups groups: each has some vectors, but formats whose
/// scale is of the whole row, and Hadamard, are the first group's alone. They are all of a block,
/// or each group works alone.
template <typename CacheRows, int kVectors, int kGroups>
struct EntryFinish {
  static constexpr int kOwn = kVectors / kGroups, kThreads = kGroups * kGroupLanes;
  static_assert(kOwn * kGroups == kVectors);
  static constexpr bool kSpreads = kGroups > 1 && CacheRows::kVectorsAlone;
  using Weights = Row<kSpreads ? kOwn : kVectors>;
  struct Shared {
    alignas(16) float pooled[Row<kVectors>::kMaxElems];
    gpu::CosSin angle[Row<kVectors>::kMaxElems / 2];
    float factor;
  };

  /// Of this group's vectors, or of all where the first group has them.
  DSV4_DEVICE static Weights weights(const CompressArgs& args) {
    if constexpr (kSpreads) {
      return gpu::load_weights<kOwn, Access::kPairs, kGroups>(args.norm, args.norm_is_bf16,
                                                              args.width);
    } else {
      return whole_weights(args);
    }
  }
  DSV4_DEVICE static Row<kVectors> whole_weights(const CompressArgs& args) {
    return gpu::load_weights<kVectors, Access::kPairs>(args.norm, args.norm_is_bf16, args.width);
  }
  /// What does not wait for the row. The last threads first: the first ones add up the squares. A
  /// barrier must follow, behind which `pooled` is complete, too.
  DSV4_DEVICE static void prepare(const CompressArgs& args, int32_t last, Shared& shared) {
    const int32_t position = gpu::entry_position(args, last);
    for (int p = kThreads - 1 - thread_idx() % kThreads; p < args.rope.pairs; p += kThreads)
      shared.angle[p] = gpu::rope_angle(position, args.rope.frequencies[p]);
  }

  DSV4_DEVICE static void run(const CompressArgs& args, int64_t token, int64_t slot,
                              const Weights& own_weights, Shared& shared) {
    const auto angle_of = [&](int p) { return shared.angle[p]; };
    const bool spread = kSpreads && !args.hadamard;
    if (group_idx() % kGroups == 0) {
      const auto row = gpu::load_row<kVectors, Access::kPairs>(shared.pooled, args.width);
      const float factor = gpu::entry_factor(args, row);
      if (spread) {
        if (group_lane() == 0) shared.factor = factor;
      } else if constexpr (kSpreads) {
        gpu::finish_entry<CacheRows>(args, token, slot, row, factor, whole_weights(args), angle_of);
      } else {
        gpu::finish_entry<CacheRows>(args, token, slot, row, factor, own_weights, angle_of);
      }
    }
    if constexpr (kSpreads) {
      if (!spread) return;
      block_sync();
      gpu::finish_entry<CacheRows, kGroups>(
          args, token, slot,
          gpu::load_row<kOwn, Access::kPairs, kGroups>(shared.pooled, args.width), shared.factor,
          own_weights, angle_of);
    }
  }
};

constexpr float kInfinity = std::bit_cast<float>(0x7f800000u);

// A thread's channels of the rows of an entry: Lane::at[channel].

/// Rows before `begin` and from `end` on do not exist: they add exactly nothing.
template <typename Lane, int kRows>
DSV4_DEVICE void leave_out_rows(Lane (&score)[kRows], Lane (&value)[kRows], int begin, int end) {
  constexpr int kChannels = sizeof(Lane::at) / sizeof(float);
  if (begin == 0 && end == kRows) return;
  DSV4_UNROLL
  for (int k = 0; k < kRows; ++k) {
    if (k >= begin && k < end) continue;
    DSV4_UNROLL
    for (int c = 0; c < kChannels; ++c) score[k].at[c] = -kInfinity, value[k].at[c] = 0.0f;
  }
}
template <typename Lane, int kRows>
DSV4_DEVICE Lane pool_rows(const Lane (&score)[kRows], const Lane (&value)[kRows]) {
  constexpr int kChannels = sizeof(Lane::at) / sizeof(float);
  Lane pooled;
  DSV4_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    float largest = score[0].at[c];
    DSV4_UNROLL
    for (int k = 1; k < kRows; ++k) largest = fmaxf(largest, score[k].at[c]);
    PoolSum total{};
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      total.add(gpu::exp_not_positive(score[k].at[c] - largest), value[k].at[c]);
    }
    pooled.at[c] = total.result();
  }
  return pooled;
}

}  // namespace dsv4::nvidia::compressor
