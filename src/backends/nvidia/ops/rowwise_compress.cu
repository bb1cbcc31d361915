// The compressor's step on NVIDIA (docs/kernels/rowwise_gpu.md): the operation, plan and numerics
// of gpu/compress.h, whose kernels AMD and the executor run, with kernels for this compiler and
// these registers.
//
// Problem   gpu/compress.h
// Tiling    few rows (ratio 4: 8): CompressEntries, a block for some tokens; a lane pools two or
//           four channels, then the groups share the entry's vectors
//           many (ratio 128): CompressPool, 32 channels a block; a lane has 32 rows of its channel
//           in registers, sums go from group to group; CompressFinish: a block per entry
//           ring rows: a group of CompressFinish each
// Budget    per entry: pooled_tokens x 2 x width x 4 B (ratio 4: 32 KiB, ratio 128: 512 KiB); per
//           pooled value some 50 instructions, of which 28 are its exponential
// Launch    as in gpu/compress.h: grids are fixed by the number of tokens, and where every sequence
//           has one token the launch that pools writes the ring, too
// Contract  rows of positions < 0 are never read; `width` is a multiple of 32, at most 1024
// Numerics  the bits of gpu/compress.h
#include <algorithm>

#include "backends/gpu/rowwise_ops.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/rowwise_compress.h"

namespace dsv4::nvidia {

using gpu::Access;
using gpu::block_idx;
using gpu::block_sync;
using gpu::group_idx;
using gpu::group_lane;
using gpu::group_sync;
using gpu::kGroupLanes;
using gpu::PoolRows;
using gpu::PoolSum;
using gpu::RopeTable;
using gpu::Row;
using gpu::shuffle;
using gpu::thread_idx;
using gpu::TokenPlan;
using gpu::Words;

struct CompressArgs : gpu::CompressArgs {
  int32_t entry_tokens;             // of a block of entries of CompressFinish
  int32_t seqs, ring_rows_per_seq;  // what the ring may have to take
};

/// Rows in shared memory; two arrays, so that addresses of `ape` are not in registers before they
/// are wanted.
template <int kRows>
struct RowList {
  const float* value[kRows];
  const float* ape[kRows];
  DSV4_DEVICE void put(int r, const gpu::PoolRow& row) {
    value[r] = row.value;
    ape[r] = row.adds_ape ? row.ape : nullptr;
  }
};

// ---- an entry, and a ring row

/// From the pooled row to the cache, by all groups of a block: each has some vectors, but formats
/// whose scale is of the whole row, and Hadamard, are the first group's alone.
template <typename CacheRows, int kVectors, int kGroups>
struct EntryFinish {
  static constexpr int kOwn = kVectors / kGroups;
  static_assert(kOwn * kGroups == kVectors);
  struct Shared {
    alignas(16) float pooled[Row<kVectors>::kMaxElems];
    RopeTable table;
    float factor;
  };

  /// What can be asked for before the row is known: the weights of this group's vectors, and the
  /// angles. A barrier must follow, behind which `pooled` is complete, too.
  DSV4_DEVICE static Row<kOwn> prepare(const CompressArgs& args, int32_t last, Shared& shared) {
    shared.table.template fill<kGroups * kGroupLanes>(args.rope, gpu::entry_position(args, last),
                                                      1.0f);
    return gpu::load_weights<kOwn, Access::kPairs, kGroups>(args.norm, args.norm_is_bf16,
                                                            args.width);
  }

  DSV4_DEVICE static void run(const CompressArgs& args, int64_t token, const Row<kOwn>& weight,
                              Shared& shared) {
    const int64_t slot = args.slots[token];
    const auto angle_of = [&](int p) { return shared.table.angle[p]; };
    const bool spread = CacheRows::kVectorsAlone && !args.hadamard;
    if (group_idx() == 0) {
      auto row = gpu::load_row<kVectors, Access::kPairs>(shared.pooled, args.width);
      const float factor = gpu::inverse_rms(gpu::sum_squares(row), args.width, args.eps);
      if (spread) {
        if (group_lane() == 0) shared.factor = factor;
      } else {
        gpu::scale_row(
            row, factor,
            gpu::load_weights<kVectors, Access::kPairs>(args.norm, args.norm_is_bf16, args.width));
        gpu::rotate_tail(row, args.width, args.rope.pairs, angle_of);
        if (args.hadamard) gpu::hadamard_row(row, args.width);
        if (args.round_to_bf16) gpu::round_row_to_bf16(row);
        CacheRows::store(args.cache, slot, row);
        if (args.entries != nullptr)
          gpu::store_row<Access::kPairs>(args.entries + token * args.entries_stride, args.width,
                                         row);
      }
    }
    if constexpr (CacheRows::kVectorsAlone) {
      if (!spread) return;
      block_sync();
      auto row = gpu::load_row<kOwn, Access::kPairs, kGroups>(shared.pooled, args.width);
      gpu::scale_row(row, shared.factor, weight);
      gpu::rotate_tail<kGroups>(row, args.width, args.rope.pairs, angle_of);
      if (args.round_to_bf16) gpu::round_row_to_bf16(row);
      CacheRows::template store<kGroups>(args.cache, slot, row);
      if (args.entries != nullptr)
        gpu::store_row<Access::kPairs, kGroups>(args.entries + token * args.entries_stride,
                                                args.width, row);
    }
  }
};

/// Does the ring keep the row of a token? It keeps the last ones of each sequence. Padding tokens
/// claim sequence 0 but lie after its last one.
DSV4_DEVICE bool is_kept(const CompressArgs& args, int64_t token, int32_t sequence) {
  const int64_t sequence_end = args.query_start[sequence + 1];
  return token < sequence_end && sequence_end - token <= args.ring_rows;
}
/// By kLanes lanes, of which this is `lane`.
template <int kLanes>
DSV4_DEVICE void keep_row(const CompressArgs& args, int64_t token, int32_t position,
                          int32_t state_slot, int lane) {
  const float* gates = args.gates + token * args.gates_stride;
  const float* ape = args.ape + int64_t{position % args.ratio} * args.ape_stride;
  float* state =
      gpu::ring_of(args, state_slot) + int64_t{position % args.ring_rows} * args.state_row_elems;
  const int half = args.half();
  DSV4_UNROLL_BY(4)
  for (int c = 4 * lane; c < half; c += 4 * kLanes) {
    const auto value = gpu::load_as<Words<4>>(gates + c),
               score = gpu::load_as<Words<4>>(gates + half + c),
               add = gpu::load_as<Words<4>>(ape + c);
    Words<4> sum;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i)
      sum.word[i] = gpu::bits_of(gpu::float_of(score.word[i]) + gpu::float_of(add.word[i]));
    gpu::store_as(state + c, value);
    gpu::store_as(state + half + c, sum);
  }
}
/// Of a block that looks at tokens one by one.
template <int kThreads>
DSV4_DEVICE void keep_rows(const CompressArgs& args, int64_t begin, int count) {
  for (int64_t t = begin; t < begin + count && t < args.tokens; ++t) {
    const int32_t sequence = args.token_to_seq[t], position = args.positions[t];
    const int32_t state_slot = args.state_slot[sequence];
    if (is_kept(args, t, sequence)) keep_row<kThreads>(args, t, position, state_slot, thread_idx());
  }
}

/// Tokens of a block or group: every lane looks at one of them, as every answer of the plan is a
/// trip to memory.
struct TokenLane {
  bool is_mine;
  int64_t token;  // the first one where there is none for this lane
  DSV4_DEVICE static TokenLane of(const CompressArgs& args, int64_t begin, int count) {
    const bool is_mine = group_lane() < count && begin + group_lane() < args.tokens;
    return {is_mine, is_mine ? begin + group_lane() : begin};
  }
};
/// Calls make(token, plan) for the emitting ones of tokens [begin, begin + count), count <= 32, by
/// all lanes that call it.
template <typename Make>
DSV4_DEVICE void for_entries(const CompressArgs& args, int64_t begin, int count, Make make) {
  const TokenLane mine = TokenLane::of(args, begin, count);
  const int32_t sequence = args.token_to_seq[mine.token], position = args.positions[mine.token];
  const int emits = mine.is_mine && args.slots[mine.token] >= 0 ? 1 : 0;
  if (gpu::group_max(emits) == 0) return;
  const TokenPlan plan = TokenPlan::of(args, sequence, position);
  for (int i = 0; i < count; ++i) {
    if (shuffle(emits, i) == 0) continue;
    make(begin + i, TokenPlan{shuffle(plan.position, i), shuffle(plan.context, i),
                              shuffle(plan.query_start, i), shuffle(plan.state_slot, i)});
  }
}

/// Numbers of neighbouring channels in a lane.
template <int kCount>
struct Channels {
  float at[kCount];
  DSV4_DEVICE static Channels load(const float* from) {
    return std::bit_cast<Channels>(gpu::load_as<Words<kCount>>(from));
  }
};

/// At most kRows pooled rows, all in registers. A row of the entry is 64 kVectors channels at most.
template <typename CacheRows, int kVectors>
struct CompressEntries {
  using Params = CompressArgs;
  static constexpr int kLaneChannels = kVectors == 2 ? 2 : 4;
  static constexpr int kThreads = kVectors * gpu::kVectorElems / kLaneChannels;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kMinBlocks = kVectors == 8 ? 4 : 1;
  static constexpr int kRows = 8;
  using Lane = Channels<kLaneChannels>;
  using Finish = EntryFinish<CacheRows, kVectors, kGroups>;
  // Groups that are late may still read the entry before.
  struct Shared {
    typename Finish::Shared entries[2];
    RowList<kRows> rows[kGroups];
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Shared, shared);
    const int64_t begin = block_idx() * args.tokens_per_block;
    int turn = 0;
    for_entries(args, begin, args.tokens_per_block, [&](int64_t token, const TokenPlan& plan) {
      make_entry(args, token, plan, shared.entries[turn], shared.rows[group_idx()]);
      turn ^= 1;
    });
    if (args.keeps_rows) keep_rows<kThreads>(args, begin, args.tokens_per_block);
  }

  DSV4_DEVICE static void make_entry(const Params& args, int64_t token, const TokenPlan& plan,
                                     typename Finish::Shared& entry, RowList<kRows>& row_list) {
    const PoolRows rows = PoolRows::of(args, plan);
    const int begin = rows.begin(args), end = args.pooled_tokens();
    const int channel = kLaneChannels * thread_idx();
    group_sync();  // the list before has been read
    if (group_lane() < kRows) row_list.put(group_lane(), rows.row(args, group_lane()));
    group_sync();
    Lane score[kRows], value[kRows];
    if (channel < args.width) {
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const float* row = row_list.value[k] + channel;
        value[k] = Lane::load(row);
        score[k] = Lane::load(row + args.half());
      }
      // -0 + 0 is another zero, but no other exponential.
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const float* from = row_list.ape[k];
        Lane ape{};
        if (from != nullptr) ape = Lane::load(from + channel);
        DSV4_UNROLL
        for (int c = 0; c < kLaneChannels; ++c) score[k].at[c] = score[k].at[c] + ape.at[c];
      }
    }
    const auto weight = Finish::prepare(args, plan.position, entry);  // rows are on their way
    if (channel < args.width) {
      Lane pooled;
      DSV4_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) {
        float largest = score[kRows - 1].at[c];  // a row that exists, or its like
        DSV4_UNROLL
        for (int k = 0; k + 1 < kRows; ++k) {
          if (k >= begin && k < end) largest = fmaxf(largest, score[k].at[c]);
        }
        PoolSum total{};
        DSV4_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (k < begin || k >= end) continue;
          total.add(gpu::exp_not_positive(score[k].at[c] - largest), value[k].at[c]);
        }
        pooled.at[c] = total.result();
      }
      gpu::store_as(entry.pooled + channel, std::bit_cast<Words<kLaneChannels>>(pooled));
    }
    block_sync();
    Finish::run(args, token, weight, entry);
  }
};

/// Any number of pooled rows. A lane has one channel.
struct CompressPool {
  using Params = CompressArgs;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr int kChannels = kGroupLanes;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kGroupRows = 32;  // in registers
  static constexpr int kTileRows = kGroups * kGroupRows;

  struct Shared {
    RowList<kTileRows> rows;
    float largest[kGroups][kChannels];
    PoolSum sums[kChannels];
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Shared, shared);
    const auto block = static_cast<uint32_t>(block_idx());
    const auto channel_blocks = static_cast<uint32_t>(args.channel_blocks);
    const uint32_t token_block = block / channel_blocks;
    const int channel = static_cast<int>(block - token_block * channel_blocks) * kChannels;
    const int64_t begin = int64_t{token_block} * args.tokens_per_block;
    for_entries(args, begin, args.tokens_per_block, [&](int64_t token, const TokenPlan& plan) {
      pool(args, token, plan, channel + group_lane(), shared);
    });
    if (args.keeps_rows && channel == 0) keep_rows<kThreads>(args, begin, args.tokens_per_block);
  }

  // Maxima may be taken in any order: a NaN among the scores makes the result NaN either way, as
  // its own probability is.
  DSV4_DEVICE static void pool(const Params& args, int64_t token, const TokenPlan& plan,
                               int channel, Shared& shared) {
    const PoolRows rows = PoolRows::of(args, plan);
    const int begin = rows.begin(args), end = args.pooled_tokens();
    const bool one_tile = end - begin <= kTileRows;
    const int first = group_idx() * kGroupRows;  // of this group's rows of a tile
    float score[kGroupRows], value[kGroupRows];
    const auto load_tile = [&](int tile) {
      block_sync();  // the list before has been read
      for (int r = thread_idx(); r < kTileRows; r += kThreads)
        shared.rows.put(r, rows.row(args, tile + r));
      block_sync();
      DSV4_UNROLL
      for (int j = 0; j < kGroupRows; ++j) {
        const float* row = (shared.rows.value[first + j]) + channel;
        value[j] = *row;
        score[j] = row[args.half()];
      }
      // Rows of the step are the last ones. -0 + 0 is another zero, but no other exponential.
      if (shared.rows.ape[first + kGroupRows - 1] != nullptr) {
        DSV4_UNROLL
        for (int j = 0; j < kGroupRows; ++j) {
          const float* ape = shared.rows.ape[first + j];
          score[j] = score[j] + (ape != nullptr ? (ape)[channel] : 0.0f);
        }
      }
    };
    // f(j) for the rows of this group that exist.
    const auto for_rows = [&](int tile, auto f) {
      if (tile + first + kGroupRows <= end) {
        DSV4_UNROLL
        for (int j = 0; j < kGroupRows; ++j) f(j);
      } else {
        DSV4_UNROLL
        for (int j = 0; j < kGroupRows; ++j) {
          if (tile + first + j < end) f(j);
        }
      }
    };
    float largest = -kInfinity;
    for (int tile = begin; tile < end; tile += kTileRows) {
      load_tile(tile);
      for_rows(tile, [&](int j) { largest = fmaxf(largest, score[j]); });
    }
    shared.largest[group_idx()][group_lane()] = largest;
    block_sync();
    DSV4_UNROLL
    for (int g = 0; g < kGroups; ++g) largest = fmaxf(largest, shared.largest[g][group_lane()]);

    for (int tile = begin; tile < end; tile += kTileRows) {
      if (!one_tile) load_tile(tile);
      DSV4_UNROLL
      for (int j = 0; j < kGroupRows; ++j) {
        score[j] = gpu::exp_not_positive(score[j] - largest);
        value[j] = score[j] * value[j];
      }
      // Group after group goes on with the sums of the one before.
      for (int turn = 0; turn < kGroups && tile + turn * kGroupRows < end; ++turn) {
        if (group_idx() == turn) {
          PoolSum total{};
          if (tile > begin || turn > 0) total = shared.sums[group_lane()];
          for_rows(tile, [&](int j) {
            total.sum = total.sum + score[j];
            total.weighted = total.weighted + value[j];
          });
          if (tile + first + kGroupRows < end) {
            shared.sums[group_lane()] = total;
          } else {
            args.pooled[token * args.width + channel] = total.result();
          }
        }
        block_sync();
      }
    }
  }

  static constexpr float kInfinity = std::bit_cast<float>(0x7f800000u);
};

/// What is left after the launch that pools. Blocks [0, entry_blocks): entries of `pooled`. The
/// others: ring rows, a group each, counted from the last token of a sequence.
template <typename CacheRows, int kVectors>
struct CompressFinish {
  using Params = CompressArgs;
  static constexpr int kThreads = kVectors == 2 ? 64 : 128;
  static constexpr int kGroups = kThreads / kGroupLanes;
  using Finish = EntryFinish<CacheRows, kVectors, kGroups>;

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(typename Finish::Shared, shared);
    if (block_idx() < args.entry_blocks) {
      const int64_t begin = block_idx() * args.entry_tokens;
      const TokenLane mine = TokenLane::of(args, begin, args.entry_tokens);
      const int32_t position = args.positions[mine.token];  // beside the slot, not after it
      const int emits = mine.is_mine && args.slots[mine.token] >= 0 ? 1 : 0;
      for (int i = 0; i < args.entry_tokens; ++i) {
        if (shuffle(emits, i) != 0) finish(args, begin + i, shuffle(position, i), shared);
      }
      return;
    }
    const auto row =
        static_cast<int32_t>((block_idx() - args.entry_blocks) * kGroups + group_idx());
    const int32_t sequence = row / args.ring_rows_per_seq;
    if (sequence >= args.seqs) return;
    const int32_t back = row - sequence * args.ring_rows_per_seq;
    const int32_t state_slot = args.state_slot[sequence];
    const int64_t token = args.query_start[sequence + 1] - 1 - back;
    if (token >= args.query_start[sequence])
      keep_row<kGroupLanes>(args, token, args.positions[token], state_slot, group_lane());
  }

  DSV4_DEVICE static void finish(const Params& args, int64_t token, int32_t last,
                                 typename Finish::Shared& shared) {
    constexpr int kOwn = Finish::kOwn;
    const auto row =
        gpu::load_row<kOwn, Access::kPairs, kGroups>(args.pooled + token * args.width, args.width);
    block_sync();  // the entry before has been read
    const auto weight = Finish::prepare(args, last, shared);
    gpu::store_row<Access::kPairs, kGroups>(shared.pooled, args.width, row);
    block_sync();
    Finish::run(args, token, weight, shared);
  }
};

void compress(const CompressParams& params, const OpContext& context) {
  const PlanView& plan = *params.plan;
  const int64_t tokens = plan.num_tokens, width = params.cache.row_elems;
  const bool few_rows = gpu::pools_few_rows(params);
  Arena::Scope scope(*context.scratch);
  float* pooled = few_rows ? nullptr : context.scratch->take_array<float>(tokens * width);
  if (context.scratch->measuring()) return;
  const CudaLaunch launch(context);
  CompressArgs args{gpu::compress_args(params, pooled), 1, plan.num_seqs,
                    std::min(params.state.ring_rows, plan.max_query_len)};
  DSV4_CHECK(params.state.row_elems % 4 == 0);
  // Blocks that fill every GPU; more tokens go to the same ones, a lane looks at each.
  constexpr int64_t kPoolBlocks = 4096, kEntryBlocks = 1024, kFinishBlocks = 256;
  const auto shares = [&](int64_t work, int64_t blocks) {
    return static_cast<int32_t>(std::clamp<int64_t>(work / blocks, 1, int64_t{kGroupLanes}));
  };
  if (!few_rows) {
    args.channel_blocks = static_cast<int32_t>(width / CompressPool::kChannels);
    args.tokens_per_block = shares(tokens * args.channel_blocks, kPoolBlocks);
    launch.run<CompressPool>(ceil_div(tokens, int64_t{args.tokens_per_block}) * args.channel_blocks,
                             args);
  }
  gpu::with_entry_rows<CudaLaunch>(
      params.cache, [&]<typename Rows, typename Vectors>(Rows, Vectors) {
        if (few_rows) {
          args.tokens_per_block = shares(tokens, kEntryBlocks);
          launch.run<CompressEntries<Rows, Vectors::value>>(
              ceil_div(tokens, int64_t{args.tokens_per_block}), args);
        }
        using Kernel = CompressFinish<Rows, Vectors::value>;
        if (!few_rows) {
          args.entry_tokens = shares(tokens, kFinishBlocks);
          args.entry_blocks = static_cast<int32_t>(ceil_div(tokens, int64_t{args.entry_tokens}));
        }
        const int64_t ring_rows = args.keeps_rows ? 0 : int64_t{args.seqs} * args.ring_rows_per_seq;
        launch.run<Kernel>(args.entry_blocks + ceil_div(ring_rows, int64_t{Kernel::kGroups}), args);
      });
}

}  // namespace dsv4::nvidia
