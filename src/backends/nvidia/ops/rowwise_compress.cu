// The compressor's step on NVIDIA (docs/kernels/rowwise_gpu.md): the operation, plan and numerics
// of gpu/compress.h, whose kernels AMD and the executor run, with kernels for this compiler and
// these registers.
//
// Problem   gpu/compress.h
// Tiling    A block has some tokens: it lists those that complete an entry, then makes one entry
//           after the other, while the rows of the next one are copied to shared memory.
//           few rows (ratio 4: 8): CompressEntries; a lane pools four channels of rows that it has
//           copied itself, then the groups share the entry's vectors; narrow rows of long steps:
//           CompressNarrow
//           many (ratio 128): CompressPool, 32 channels a block; a lane has 32 rows of its channel
//           in registers, sums go from group to group; CompressFinish: a block per entry
//           ring rows: a group of CompressFinish each; where every sequence has one token, blocks
//           that pool keep the channels of theirs
// Budget    per entry: pooled_tokens x 2 x width x 4 B (ratio 4: 32 KiB, ratio 128: 512 KiB); per
//           pooled value some 35 instructions, of which 25 are its exponential: 16,384 tokens at
//           ratio 4 are 134 MB and 20 us of all issue slots
// Launch    grids are fixed by the number of tokens: at most as many blocks as run at once. Where
//           every sequence has one token the launch that pools writes the ring, too
// Contract  rows of positions < 0 are never read; `width` is a multiple of 32, at most 1024
// Numerics  the bits of gpu/compress.h
#include <algorithm>

#include "backends/gpu/rowwise_ops.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/rowwise_compress-inl.h"
#include "backends/nvidia/ops/rowwise_compress.h"
#include "backends/nvidia/ops/rowwise_compress_narrow-inl.h"

namespace dsv4::nvidia {
namespace compressor {
namespace {

/// At most kRows pooled rows. A row of the entry is 64 kVectors channels at most, of which a lane
/// has four, or two where they are few.
template <typename CacheRows, int kVectors>
struct CompressEntries {
  static constexpr int kRows = 8, kLaneChannels = kVectors == 2 ? 2 : 4;
  static constexpr int kThreads = kVectors * gpu::kVectorElems / kLaneChannels;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kStages = kVectors > 8 ? 1 : 2;  // entries whose rows are on their way
  static constexpr int kMinBlocks = kVectors == 2 ? 8 : kVectors == 8 ? 3 : 1;
  static constexpr int kTokens = kThreads;  // looked at at once
  struct alignas(4 * kLaneChannels) Lane {
    float at[kLaneChannels];
  };
  using Finish = EntryFinish<CacheRows, kVectors, kGroups>;
  struct Shared {
    Lane value[kStages][kRows][kThreads], score[kStages][kRows][kThreads];
    // Groups that are late may still read the entry before.
    typename Finish::Shared entries[2];
    EntryList<kThreads, kTokens> list;
  };

  DSV4_DEVICE static void run(const CompressArgs& args, Shared& shared) {
    const int64_t begin = block_idx() * args.tokens_per_block;
    const int64_t limit = std::min<int64_t>(args.tokens, begin + args.tokens_per_block);
    const int channel = kLaneChannels * thread_idx();
    const auto weights = Finish::weights(args);
    Lane ape[kRows];  // what rows of the step lack
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const bool own = args.windows == 2 && k >= args.ratio;
      ape[k] = Lane{};
      if (k < args.pooled_tokens() && channel < args.width) {
        ape[k] = gpu::load_as<Lane>(args.ape + (own ? k - args.ratio : k) * args.ape_stride +
                                    (own ? args.width : 0) + channel);
      }
    }
    follow_kernels_before();
    for (int64_t from = begin; from < limit; from += kTokens) {
      shared.list.find(args, from, std::min<int64_t>(limit, from + kTokens));
      const int count = shared.list.count;
      DSV4_UNROLL
      for (int i = 0; i < kStages; ++i) {
        if (i < count) fetch_rows(args, shared.list.entries[i], channel, shared, i);
        sm80::copy_async_commit();
      }
      for (int i = 0; i < count; ++i) {
        const Entry entry = shared.list.entries[i];
        const int64_t slot = args.slots[entry.token];
        typename Finish::Shared& finish = shared.entries[i % 2];
        Finish::prepare(args, entry.position, finish);
        sm80::copy_async_wait<kStages - 1>();
        if (channel < args.width) {
          Lane score[kRows], value[kRows];
          load_rows(args, entry, ape, shared, i % kStages, score, value);
          if (i + kStages < count)
            fetch_rows(args, shared.list.entries[i + kStages], channel, shared, i % kStages);
          gpu::store_as(finish.pooled + channel, pool_rows(score, value));
        }
        sm80::copy_async_commit();
        block_sync();
        Finish::run(args, entry.token, slot, weights, finish);
      }
    }
    if (args.keeps_rows) keep_tokens<kThreads>(args, begin, limit);
  }

  DSV4_DEVICE static void fetch_rows(const CompressArgs& args, const Entry& entry, int channel,
                                     Shared& shared, int stage) {
    if (channel >= args.width) return;
    const auto fetch_row = [&](int k, const float* row) {
      fetch<sizeof(Lane)>(&shared.value[stage][k][thread_idx()], row);
      fetch<sizeof(Lane)>(&shared.score[stage][k][thread_idx()], row + args.half());
    };
    if (args.pooled_tokens() == kRows && entry.first_in_step(args) <= 0) {  // neighbours
      const float* row = args.gates + (entry.token - (kRows - 1)) * args.gates_stride + channel;
      const int first_own = args.windows == 2 ? args.ratio : kRows;
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k, row += args.gates_stride)
        fetch_row(k, row + (k >= first_own ? args.width : 0));
    } else {
      const PoolRows rows = entry.rows(args);
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) fetch_row(k, rows.row(args, k).value + channel);
    }
  }

  DSV4_DEVICE static void load_rows(const CompressArgs& args, const Entry& entry,
                                    const Lane (&ape)[kRows], const Shared& shared, int stage,
                                    Lane (&score)[kRows], Lane (&value)[kRows]) {
    const int first_in_step = entry.first_in_step(args);
    DSV4_UNROLL
    for (int k = 0; k < kRows; ++k) {
      value[k] = shared.value[stage][k][thread_idx()];
      score[k] = shared.score[stage][k][thread_idx()];
      if (k < first_in_step) continue;
      DSV4_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) score[k].at[c] = score[k].at[c] + ape[k].at[c];
    }
    const int begin = entry.rows(args).begin(args), end = args.pooled_tokens();
    leave_out_rows(score, value, begin, end);
  }
};

/// Any number of pooled rows, in tiles. A lane has one channel.
struct CompressPool {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr int kChannels = kGroupLanes;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kGroupRows = 32;  // in registers
  static constexpr int kTileRows = kGroups * kGroupRows;
  static constexpr int kTokens = 4 * kThreads, kEntries = 2 * kThreads;  // of a list
  static constexpr int kPieces = kChannels / 4;

  struct Rows {  // of a group; copied and read by its own lanes
    alignas(16) float value[kGroupRows][kChannels];
    alignas(16) float score[kGroupRows][kChannels];
  };
  struct Shared {
    Rows rows[kGroups];
    alignas(16) float ape[kTileRows][kChannels];  // where one tile takes all of it
    float largest[kGroups][kChannels];
    PoolSum sums[kChannels];
    EntryList<kThreads, kTokens, kEntries> list;
  };

  DSV4_DEVICE static void run(const CompressArgs& args, Shared& shared) {
    const auto block = static_cast<uint32_t>(block_idx());
    const auto channel_blocks = static_cast<uint32_t>(args.channel_blocks);
    const uint32_t token_block = block / channel_blocks;
    const int channel = static_cast<int>(block - token_block * channel_blocks) * kChannels;
    const int64_t begin = int64_t{token_block} * args.tokens_per_block;
    const int64_t limit = std::min<int64_t>(args.tokens, begin + args.tokens_per_block);
    // An entry of several tiles goes through them twice: maxima, then sums.
    const int tiles = (args.pooled_tokens() + kTileRows - 1) / kTileRows;
    const int turns = tiles == 1 ? 1 : 2 * tiles;
    if (has_ape(args)) {
      for (int i = thread_idx(); i < args.ratio * kPieces; i += kThreads) {
        fetch(&shared.ape[i / kPieces][i % kPieces * 4],
              args.ape + i / kPieces * args.ape_stride + channel + i % kPieces * 4);
      }
    }
    sm80::copy_async_commit();
    follow_kernels_before();
    for (int64_t from = begin; from < limit; from += args.look_tokens) {
      sm80::copy_async_wait<0>();  // of ape
      shared.list.find(args, from, std::min<int64_t>(limit, from + args.look_tokens));
      const int count = shared.list.count;
      if (count > 0) fetch_tile(args, shared.list.entries[0], 0, channel, shared);
      float largest = -kInfinity;
      for (int i = 0, turn = 0; i < count;) {
        const Entry entry = shared.list.entries[i];
        const int tile = turn % tiles;
        const bool has_largest = turn >= tiles;
        if (++turn == turns) ++i, turn = 0;
        float score[kGroupRows], value[kGroupRows];
        sm80::copy_async_wait<0>();
        group_sync();
        load_tile(args, entry, tile, channel + group_lane(), shared, score, value);
        group_sync();
        if (i < count) fetch_tile(args, shared.list.entries[i], turn % tiles, channel, shared);
        if (!has_largest) {
          if (tile == 0) largest = -kInfinity;
          DSV4_UNROLL
          for (int j = 0; j < kGroupRows; ++j) largest = fmaxf(largest, score[j]);
          if (tile + 1 < tiles) continue;
          // Maxima may be taken in any order: a NaN among the scores makes the result NaN either
          // way, as its own probability is.
          shared.largest[group_idx()][group_lane()] = largest;
          block_sync();
          DSV4_UNROLL
          for (int g = 0; g < kGroups; ++g)
            largest = fmaxf(largest, shared.largest[g][group_lane()]);
          if (tiles > 1) continue;
        }
        add_tile(args, entry, tile, largest, channel + group_lane(), shared, score, value);
      }
    }
    if (args.keeps_rows) keep_channels(args, begin, limit, channel + group_lane());
  }

  /// A channel of tokens that the ring keeps, a token a group.
  DSV4_DEVICE static void keep_channels(const CompressArgs& args, int64_t begin, int64_t end,
                                        int channel) {
    DSV4_UNROLL_BY(1)
    for (int64_t t = begin + group_idx(); t < end; t += kGroups) {
      const KeptToken token = KeptToken::of(args, t);
      const float* ape = args.ape + int64_t{token.position % args.ratio} * args.ape_stride;
      DSV4_UNROLL_BY(1)
      for (int c = channel; c < args.half(); c += args.width) {
        const float* gates = args.gates + t * args.gates_stride + c;
        const float value = gates[0], score = gates[args.half()] + ape[c];
        float* const to = token.to(args, t);
        if (to == nullptr) break;
        to[c] = value, to[args.half() + c] = score;
      }
    }
  }

  DSV4_DEVICE static bool has_ape(const CompressArgs& args) {
    return args.windows == 1 && args.ratio <= kTileRows;
  }

  DSV4_DEVICE static void fetch_tile(const CompressArgs& args, const Entry& entry, int tile,
                                     int channel, Shared& shared) {
    constexpr int kPassRows = kGroupLanes / kPieces;
    const int row_in_pass = group_lane() / kPieces, piece = 4 * (group_lane() % kPieces);
    Rows& to = shared.rows[group_idx()];
    const int first = tile * kTileRows + group_idx() * kGroupRows + row_in_pass;
    const auto fetch_row = [&](int r, const float* row) {
      fetch(&to.value[r + row_in_pass][piece], row);
      fetch(&to.score[r + row_in_pass][piece], row + args.half());
    };
    if (args.windows == 1 && args.pooled_tokens() % kTileRows == 0 &&
        entry.first_in_step(args) <= 0) {  // neighbours
      const float* row = args.gates +
                         (entry.token - (args.pooled_tokens() - 1) + first) * args.gates_stride +
                         channel + piece;
      DSV4_UNROLL
      for (int r = 0; r < kGroupRows; r += kPassRows, row += kPassRows * args.gates_stride)
        fetch_row(r, row);
    } else if (has_ape(args) && entry.position >= args.pooled_tokens() - 1) {  // all of them exist
      const int end = args.pooled_tokens(), first_in_step = entry.first_in_step(args);
      const int shift = entry.position % args.ring_rows - (end - 1);  // of row 0 in the ring
      const float* step = args.gates + (entry.token - (end - 1)) * args.gates_stride;
      const float* ring = gpu::ring_of(args, entry.state_slot);
      DSV4_UNROLL
      for (int r = 0; r < kGroupRows; r += kPassRows) {
        const int k = std::min(first + r, end - 1);
        const int in_ring = k + shift + (k + shift < 0 ? args.ring_rows : 0);
        const float* row = k >= first_in_step ? step + k * args.gates_stride
                                              : ring + int64_t{in_ring} * args.state_row_elems;
        fetch_row(r, row + channel + piece);
      }
    } else {
      const PoolRows rows = entry.rows(args);
      DSV4_UNROLL
      for (int r = 0; r < kGroupRows; r += kPassRows)
        fetch_row(r, rows.row(args, first + r).value + channel + piece);
    }
    sm80::copy_async_commit();
  }

  /// This lane's channel of this group's rows; those that do not exist add exactly nothing.
  DSV4_DEVICE static void load_tile(const CompressArgs& args, const Entry& entry, int tile,
                                    int channel, Shared& shared, float (&score)[kGroupRows],
                                    float (&value)[kGroupRows]) {
    Rows& rows = shared.rows[group_idx()];
    const int first = tile * kTileRows + group_idx() * kGroupRows;
    const int begin = entry.rows(args).begin(args), end = args.pooled_tokens();
    const int first_in_step = entry.first_in_step(args);
    DSV4_UNROLL
    for (int j = 0; j < kGroupRows; ++j) score[j] = rows.score[j][group_lane()];
    const bool has_all = begin <= first && first + kGroupRows <= end;
    if (has_all && has_ape(args)) {
      DSV4_UNROLL
      for (int j = 0; j < kGroupRows; ++j) {
        if (first + j >= first_in_step) score[j] = score[j] + shared.ape[first + j][group_lane()];
      }
    } else {
      const float* ape = args.ape + channel;
      DSV4_UNROLL_BY(1)
      for (int j = 0; j < kGroupRows; ++j) {
        const int k = first + j;
        const bool own = args.windows == 2 && k >= args.ratio;
        // Seldom: by way of the copied row, as registers have no numbers.
        float& at = rows.score[j][group_lane()];
        if (k < begin || k >= end) {
          at = -kInfinity;
          rows.value[j][group_lane()] = 0.0f;
        } else if (k >= first_in_step) {
          at = at + ape[(own ? k - args.ratio : k) * args.ape_stride + (own ? args.width : 0)];
        }
      }
      DSV4_UNROLL
      for (int j = 0; j < kGroupRows; ++j) score[j] = rows.score[j][group_lane()];
    }
    group_sync();  // scores first: all at once are too many registers
    DSV4_UNROLL
    for (int j = 0; j < kGroupRows; ++j) value[j] = rows.value[j][group_lane()];
  }

  /// Group after group goes on with the sums of the one before.
  DSV4_DEVICE static void add_tile(const CompressArgs& args, const Entry& entry, int tile,
                                   float largest, int channel, Shared& shared,
                                   float (&score)[kGroupRows], float (&value)[kGroupRows]) {
    DSV4_UNROLL
    for (int j = 0; j < kGroupRows; ++j) {
      score[j] = gpu::exp_not_positive(score[j] - largest);
      value[j] = score[j] * value[j];
    }
    const bool is_last = (tile + 1) * kTileRows >= args.pooled_tokens();
    DSV4_UNROLL_BY(1)
    for (int turn = 0; turn < kGroups; ++turn) {
      if (group_idx() == turn) {
        PoolSum total{};
        if (tile > 0 || turn > 0) total = shared.sums[group_lane()];
        DSV4_UNROLL
        for (int j = 0; j < kGroupRows; ++j) {
          total.sum = total.sum + score[j];
          total.weighted = total.weighted + value[j];
        }
        if (is_last && turn == kGroups - 1) {
          args.pooled[int64_t{entry.token} * args.width + channel] = total.result();
        } else {
          shared.sums[group_lane()] = total;
        }
      }
      block_sync();
    }
  }
};

/// What is left after the launch that pools. Blocks [0, entry_blocks): entries of `pooled`. The
/// others: ring rows, a group each, counted from the last token of a sequence. The launch that
/// pools has waited for those before it, so that what it does not write is read without waiting for
/// it. It lets the next kernel start at once: that one waits for this one's end, and so for the
/// launch that pools.
template <typename CacheRows, int kVectors>
struct CompressFinish {
  static constexpr int kThreads = kVectors == 2 ? 64 : 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kGroups = kThreads / kGroupLanes;
  using Finish = EntryFinish<CacheRows, kVectors, kGroups>;
  using Shared = typename Finish::Shared;

  DSV4_DEVICE static void run(const CompressArgs& args, Shared& shared) {
    start_next_kernel();
    if (block_idx() < args.entry_blocks) {
      finish_entries(args, shared);
    } else {
      keep_last_rows(args);
    }
    wait_for_kernels_before();
  }

  DSV4_DEVICE static void finish_entries(const CompressArgs& args, Shared& shared) {
    constexpr int kOwn = Finish::kOwn;
    const int64_t begin = block_idx() * args.entry_tokens;
    // Every lane looks at one token.
    const bool is_mine = group_lane() < args.entry_tokens && begin + group_lane() < args.tokens;
    const int64_t mine = is_mine ? begin + group_lane() : begin;
    const auto position = load_fresh<int32_t>(args.positions + mine);
    const auto slot = static_cast<int64_t>(load_fresh<long long>(args.slots + mine));
    const int emits = is_mine && slot >= 0 ? 1 : 0;
    const auto weights = Finish::weights(args);
    for (int i = 0; i < args.entry_tokens; ++i) {
      if (shuffle(emits, i) == 0) continue;
      const int64_t token = begin + i;
      block_sync();  // the entry before has been read
      Finish::prepare(args, shuffle(position, i), shared);
      wait_for_kernels_before();
      gpu::store_row<Access::kPairs, kGroups>(shared.pooled, args.width,
                                              gpu::load_row<kOwn, Access::kPairs, kGroups>(
                                                  args.pooled + token * args.width, args.width));
      block_sync();
      Finish::run(args, token, args.slots[token], weights, shared);
    }
  }

  DSV4_DEVICE static void keep_last_rows(const CompressArgs& args) {
    const auto row =
        static_cast<int32_t>((block_idx() - args.entry_blocks) * kGroups + group_idx());
    const int32_t sequence = row / args.ring_rows_per_seq;
    if (sequence >= args.seqs) return;
    const int32_t back = row - sequence * args.ring_rows_per_seq;
    const auto state_slot = load_fresh<int32_t>(args.state_slot + sequence);
    const int64_t token = load_fresh<int32_t>(args.query_start + sequence + 1) - 1 - back;
    if (token < load_fresh<int32_t>(args.query_start + sequence)) return;
    const auto position = load_fresh<int32_t>(args.positions + token);
    keep_row<kGroupLanes, 8>(args, token, position, group_lane(), [&] {
      wait_for_kernels_before();
      return ring_row(args, state_slot, position);
    });
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    compress_entry(const __grid_constant__ CompressArgs args) {
  extern __shared__ __align__(16) std::byte memory[];
  Kernel::run(args, *reinterpret_cast<typename Kernel::Shared*>(memory));
}
template <typename Kernel>
void start(int64_t blocks, const CompressArgs& args, const OpContext& context) {
  if (blocks == 0) return;
  launch<compress_entry<Kernel>>(
      {dim3(static_cast<unsigned>(blocks)), Kernel::kThreads, sizeof(typename Kernel::Shared)},
      stream_of(context.stream), args);
}

/// Tokens of a block where `shares` of them are wanted. Windows are not cut, so that blocks have
/// equal numbers of entries.
int32_t tokens_of_block(int64_t tokens, int64_t shares, int32_t ratio) {
  const int64_t some = std::max<int64_t>(1, ceil_div(tokens, std::max<int64_t>(1, shares)));
  return static_cast<int32_t>(some > ratio ? round_up(some, int64_t{ratio}) : some);
}

}  // namespace
}  // namespace compressor

void compress(const CompressParams& params, const OpContext& context) {
  using namespace compressor;
  const PlanView& plan = *params.plan;
  const int64_t tokens = plan.num_tokens, width = params.cache.row_elems;
  const bool few_rows = gpu::pools_few_rows(params);
  Arena::Scope scope(*context.scratch);
  float* pooled = few_rows ? nullptr : context.scratch->take_array<float>(tokens * width);
  if (context.scratch->measuring()) return;
  compressor::CompressArgs args{gpu::compress_args(params, pooled), 1, 1, plan.num_seqs,
                                std::min(params.state.ring_rows, plan.max_query_len)};
  DSV4_CHECK(params.state.row_elems % 4 == 0);
  if (!few_rows) {
    args.channel_blocks = static_cast<int32_t>(width / CompressPool::kChannels);
    // A sequence has an entry for every `ratio` tokens, and one more.
    using Kernel = CompressPool;
    const int most = std::min(plan.num_seqs, Kernel::kTokens) + Kernel::kTokens / args.ratio;
    args.look_tokens = most <= Kernel::kEntries ? Kernel::kTokens : Kernel::kEntries;
    args.tokens_per_block = tokens_of_block(
        tokens, num_multiprocessors() * Kernel::kMinBlocks / args.channel_blocks, args.ratio);
    start<Kernel>(ceil_div(tokens, int64_t{args.tokens_per_block}) * args.channel_blocks, args,
                  context);
  }
  gpu::with_entry_rows<CudaLaunch>(params.cache, [&]<typename Rows, typename Vectors>(Rows,
                                                                                      Vectors) {
    if constexpr (Vectors::value == 2) {
      // In shorter steps two launches are faster: what they do for a ring is not in a row.
      constexpr int kLongStep = 4096;
      using Kernel = CompressNarrow<Rows>;
      if (few_rows && plan.max_query_len >= kLongStep) {
        args.tokens_per_block = tokens_of_block(
            tokens, int64_t{num_multiprocessors()} * Kernel::kMinBlocks, args.ratio);
        return start<Kernel>(args.seqs + ceil_div(tokens, int64_t{args.tokens_per_block}), args,
                             context);
      }
    }
    if (few_rows) {
      using Kernel = CompressEntries<Rows, Vectors::value>;
      args.tokens_per_block =
          tokens_of_block(tokens, int64_t{num_multiprocessors()} * Kernel::kMinBlocks, args.ratio);
      start<Kernel>(ceil_div(tokens, int64_t{args.tokens_per_block}), args, context);
    }
    using Kernel = CompressFinish<Rows, Vectors::value>;
    if (!few_rows) {
      // A lane looks at each token of a block.
      constexpr int64_t kFinishBlocks = 256;
      args.entry_tokens = static_cast<int32_t>(
          std::clamp<int64_t>(tokens / kFinishBlocks, 1, int64_t{kGroupLanes}));
      args.entry_blocks = static_cast<int32_t>(ceil_div(tokens, int64_t{args.entry_tokens}));
    }
    const int64_t ring_rows = args.keeps_rows ? 0 : int64_t{args.seqs} * args.ring_rows_per_seq;
    start<Kernel>(args.entry_blocks + ceil_div(ring_rows, int64_t{Kernel::kGroups}), args, context);
  });
}

}  // namespace dsv4::nvidia
