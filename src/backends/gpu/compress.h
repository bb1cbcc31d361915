// Compressor step (compressor.md 1): entries are pooled from the rows of this step and of the ring,
// normed, rotated and stored; then the ring takes the step's last rows.
//
// Problem   entry c of a channel = sum_k softmax_k(s_k) v_k over the `pooled_tokens` rows up to the
//           entry's last token; overlapping windows take the first half of the channels from the
//           window before, the second half from the entry's own
// Tiling    few rows (ratio 4: 8): CompressEntries, a block per token; a lane pools two channels,
//           one group finishes the entry
//           many (ratio 128): CompressPoolTiles, 32 channels a block; 32 rows at a time are read by
//           8 lanes each, probabilities and values go through shared memory, one group adds them
//           up; CompressFinish: a group per entry
//           ring rows: blocks of CompressFinish
// Budget    per entry: pooled_tokens x 2 x width x 4 B (ratio 4: 32 KiB, ratio 128: 512 KiB)
// Launch    grids are fixed by the number of tokens; blocks without an emitting token end at once.
//           What is written to the ring is read in launches before. Only where every sequence has
//           one token (decode) the launch that pools does both: the row that it overwrites is then
//           one that no entry of the step pools
// Contract  rows of positions < 0 are never read; `width` is a multiple of 32, at most 1024
// Numerics  rows are added in ascending order of position, so an entry's bits do not depend on
//           where a chunk began: a ring row holds s + ape as the sum here gives it
#pragma once
#include "backends/gpu/cache_row.h"

namespace dsv4::gpu {

struct CompressArgs {
  int32_t tokens;
  int32_t ratio, windows, width;
  // the plan
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* state_slot;
  const int32_t* positions;
  const int32_t* token_to_seq;
  const int64_t* slots;  // -1: emits nothing
  // the rows
  const float* gates;  // [tokens, 2 * windows * width]: v, then s without ape
  int64_t gates_stride;
  const float* ape;  // [ratio, windows * width]
  int64_t ape_stride;
  float* state;
  int64_t state_slot_stride;
  int32_t ring_rows, state_row_elems;
  float* pooled;  // [tokens, width]: entries of emitting tokens between the launches
  // the entry
  const void* norm;
  bool norm_is_bf16, hadamard, round_to_bf16;
  float eps;
  Rope rope;
  CachePages cache;
  float* entries;  // tap, may be null
  int64_t entries_stride;
  // grids
  bool keeps_rows;                              // the launch that pools writes the ring, too
  int32_t tokens_per_block, channel_blocks;     // CompressPoolTiles
  int32_t entry_blocks, ring_tokens_per_block;  // CompressFinish

  DSV4_DEVICE int half() const { return windows * width; }
  DSV4_DEVICE int pooled_tokens() const { return windows * ratio; }
};

/// The ring of a sequence.
DSV4_DEVICE float* ring_of(const CompressArgs& args, int32_t state_slot) {
  return args.state + state_slot * args.state_slot_stride;
}

/// What pooling asks the plan about a token.
struct TokenPlan {
  int32_t position, context, query_start, state_slot;

  DSV4_DEVICE static TokenPlan of(const CompressArgs& args, int32_t sequence, int32_t position) {
    return {position, args.context_len[sequence], args.query_start[sequence],
            args.state_slot[sequence]};
  }
};

/// Where the value and score of a pooled row lie. The score of a row of this step lacks `ape`.
struct PoolRow {
  const float* value;
  const float* score;
  const float* ape;
  bool adds_ape;
};

/// An emitting token, the last one of its window: which rows it pools. Row k has position last -
/// (pooled_tokens - 1 - k); rows of positions below 0 do not exist.
struct PoolRows {
  int32_t context, last;
  int32_t last_in_ring;  // divided once: rows are neighbours
  const float* gates;    // of position `context`
  const float* ring;

  DSV4_DEVICE static PoolRows of(const CompressArgs& args, const TokenPlan& token) {
    return {token.context, token.position, token.position % args.ring_rows,
            args.gates + int64_t{token.query_start} * args.gates_stride,
            ring_of(args, token.state_slot)};
  }
  /// The first row that exists.
  DSV4_DEVICE int begin(const CompressArgs& args) const {
    const int first = last - (args.pooled_tokens() - 1);
    return first < 0 ? -first : 0;
  }
  /// Of row k; of the last one where k does not exist. Without branches, so that loads of many rows
  /// can be on their way at once: rows of the ring have an `ape`, too, one that is at hand.
  DSV4_DEVICE PoolRow row(const CompressArgs& args, int k) const {
    const int count = args.pooled_tokens();
    const int existing = k < begin(args) || k >= count ? count - 1 : k;
    const int back = count - 1 - existing;
    const int in_ring = last_in_ring - back + (last_in_ring < back ? args.ring_rows : 0);
    const bool own = args.windows == 2 && existing >= args.ratio;
    const int in_window = own ? existing - args.ratio : existing;
    const bool in_step = last - back >= context;
    const float* row = in_step ? gates + int64_t{last - back - context} * args.gates_stride
                               : ring + int64_t{in_ring} * args.state_row_elems;
    const float* value = row + (own ? args.width : 0);
    return {value, value + args.half(),
            args.ape + int64_t{in_step ? in_window : args.ratio - 1} * args.ape_stride +
                (own ? args.width : 0),
            in_step};
  }
};

DSV4_DEVICE Pair pool_score(const PoolRow& row, int channel) {
  const Pair score = load_pair(row.score + channel), ape = load_pair(row.ape + channel);
  return row.adds_ape ? Pair{score.even + ape.even, score.odd + ape.odd} : score;
}

/// Running sums of a channel's softmax.
struct PoolSum {
  float sum, weighted;
  DSV4_DEVICE void add(float p, float value) {
    sum = sum + p;
    weighted = weighted + p * value;
  }
  DSV4_DEVICE float result() const { return weighted / sum; }
};

// ---- an entry, and a ring row

/// From the pooled row, whose 1 / rms is `factor`, to the cache. With `kGroups` > 1 the row is
/// spread over the groups of the block, which formats of independent vectors allow, and Hadamard
/// does not.
template <typename CacheRows, int kGroups = 1, int kVectors, typename AngleOf>
DSV4_DEVICE void finish_entry(const CompressArgs& args, int64_t token, int64_t slot,
                              Row<kVectors> row, float factor, const Row<kVectors>& weight,
                              AngleOf angle_of) {
  scale_row(row, factor, weight);
  rotate_tail<kGroups>(row, args.width, args.rope.pairs, angle_of);
  if constexpr (kGroups == 1) {
    if (args.hadamard) hadamard_row(row, args.width);
  }
  if (args.round_to_bf16) round_row_to_bf16(row);
  if constexpr (kGroups == 1) {
    CacheRows::store(args.cache, slot, row);
  } else {
    CacheRows::template store<kGroups>(args.cache, slot, row);
  }
  if (args.entries != nullptr)
    store_row<Access::kPairs, kGroups>(args.entries + token * args.entries_stride, args.width, row);
}
/// 1 / rms of a pooled row that one group holds.
template <int kVectors>
DSV4_DEVICE float entry_factor(const CompressArgs& args, const Row<kVectors>& row) {
  return inverse_rms(sum_squares(row), args.width, args.eps);
}

/// Position of the rotation of an entry.
DSV4_DEVICE int32_t entry_position(const CompressArgs& args, int32_t last) {
  return last / args.ratio * args.ratio;
}

/// The ring keeps the last rows of each sequence; by all lanes of a block.
template <int kThreads>
DSV4_DEVICE void keep_row(const CompressArgs& args, int64_t token) {
  const int32_t sequence = args.token_to_seq[token], position = args.positions[token];
  const int64_t sequence_end = args.query_start[sequence + 1];
  // Padding tokens claim sequence 0 but lie after the last one.
  if (token >= sequence_end || sequence_end - token > args.ring_rows) return;
  const float* gates = args.gates + token * args.gates_stride;
  const float* ape = args.ape + int64_t{position % args.ratio} * args.ape_stride;
  float* state = ring_of(args, args.state_slot[sequence]) +
                 int64_t{position % args.ring_rows} * args.state_row_elems;
  const int half = args.half();
  for (int c = 2 * thread_idx(); c < half; c += 2 * kThreads) {
    const Pair value = load_pair(gates + c), score = load_pair(gates + half + c);
    const Pair add = load_pair(ape + c);
    store_pair(state + c, value);
    store_pair(state + half + c, {score.even + add.even, score.odd + add.odd});
  }
}

/// At most kRows pooled rows, all in registers. A row of the entry is 64 kVectors channels at most.
template <typename CacheRows, int kVectors>
struct CompressEntries {
  using Params = CompressArgs;
  static constexpr int kThreads = kVectors * kGroupLanes;
  static constexpr int kRows = 8;
  struct Shared {
    float pooled[Row<kVectors>::kMaxElems];
    RopeTable table;
  };

  DSV4_DEVICE static void run(const Params& args) {
    const int64_t token = block_idx();
    const int64_t slot = args.slots[token];
    const int32_t sequence = args.token_to_seq[token], last = args.positions[token];
    if (slot >= 0) make_entry(args, token, slot, sequence, last);
    if (args.keeps_rows) keep_row<kThreads>(args, token);
  }

  DSV4_DEVICE static void make_entry(const Params& args, int64_t token, int64_t slot,
                                     int32_t sequence, int32_t last) {
    DSV4_SHARED(Shared, shared);
    const PoolRows rows = PoolRows::of(args, TokenPlan::of(args, sequence, last));
    const int begin = rows.begin(args), end = args.pooled_tokens(), channel = 2 * thread_idx();
    Pair score[kRows], value[kRows];
    if (channel < args.width) {
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const PoolRow row = rows.row(args, k);
        score[k] = pool_score(row, channel);
        value[k] = load_pair(row.value + channel);
      }
    }
    // While the rows are on their way.
    Row<kVectors> weight{};
    if (group_idx() == 0)
      weight = load_weights<kVectors, Access::kPairs>(args.norm, args.norm_is_bf16, args.width);
    shared.table.template fill<kThreads>(args.rope, entry_position(args, last), 1.0f);
    if (channel < args.width) {
      Pair largest{};
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (k < begin || k >= end) continue;
        largest = k == begin
                      ? score[k]
                      : Pair{max(largest.even, score[k].even), max(largest.odd, score[k].odd)};
      }
      PoolSum even{}, odd{};
      DSV4_UNROLL
      for (int k = 0; k < kRows; ++k) {
        if (k < begin || k >= end) continue;
        even.add(exp_not_positive(score[k].even - largest.even), value[k].even);
        odd.add(exp_not_positive(score[k].odd - largest.odd), value[k].odd);
      }
      store_pair(shared.pooled + channel, {even.result(), odd.result()});
    }
    block_sync();
    if (group_idx() != 0) return;
    const auto row = load_row<kVectors, Access::kPairs>(shared.pooled, args.width);
    finish_entry<CacheRows>(args, token, slot, row, entry_factor(args, row), weight,
                            [&](int p) { return shared.table.angle[p]; });
  }
};

/// Any number of pooled rows.
struct CompressPoolTiles {
  using Params = CompressArgs;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;  // one adds up while others wait for their rows
  static constexpr int kChannels = 32;
  static constexpr int kLaneChannels = 4;                             // 16 bytes
  static constexpr int kRowLanes = kChannels / kLaneChannels;         // lanes of a row
  static constexpr int kPassRows = kThreads / kRowLanes;              // rows of a pass
  static constexpr int kPasses = 4, kTileRows = kPasses * kPassRows;  // rows in registers
  static constexpr int kGroups = kThreads / kGroupLanes;

  struct Quad {
    float channel[kLaneChannels];
  };
  struct Shared {
    Quad p[kTileRows][kRowLanes];
    Quad value[kTileRows][kRowLanes];
    Quad largest[kGroups][kRowLanes];
  };

  DSV4_DEVICE static Quad load_quad(const float* from) {
    const auto words = load_as<Words<4>>(from);
    return {{float_of(words.word[0]), float_of(words.word[1]), float_of(words.word[2]),
             float_of(words.word[3])}};
  }
  DSV4_DEVICE static Quad score_of(const PoolRow& row, int channel) {
    Quad score = load_quad(row.score + channel);
    const Quad ape = load_quad(row.ape + channel);
    DSV4_UNROLL
    for (int c = 0; c < kLaneChannels; ++c)
      score.channel[c] = row.adds_ape ? score.channel[c] + ape.channel[c] : score.channel[c];
    return score;
  }

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Shared, shared);
    const auto block = static_cast<uint32_t>(block_idx());
    const auto channel_blocks = static_cast<uint32_t>(args.channel_blocks);
    const uint32_t token_block = block / channel_blocks;
    const int channel = static_cast<int>(block - token_block * channel_blocks) * kChannels;
    const int64_t begin = int64_t{token_block} * args.tokens_per_block;
    // Every group looks at the block's tokens at once, a lane each: every answer of the plan is a
    // trip to memory.
    const bool is_mine = group_lane() < args.tokens_per_block && begin + group_lane() < args.tokens;
    const int64_t mine = is_mine ? begin + group_lane() : begin;
    const int32_t sequence = args.token_to_seq[mine], position = args.positions[mine];
    const int emits = is_mine && args.slots[mine] >= 0 ? 1 : 0;
    if (group_max(emits) != 0) {
      const TokenPlan plan = TokenPlan::of(args, sequence, position);
      for (int i = 0; i < args.tokens_per_block; ++i) {
        if (shuffle(emits, i) == 0) continue;
        pool(args, begin + i,
             {shuffle(plan.position, i), shuffle(plan.context, i), shuffle(plan.query_start, i),
              shuffle(plan.state_slot, i)},
             channel, shared);
      }
    }
    if (!args.keeps_rows || channel != 0) return;
    for (int64_t t = begin; t < begin + args.tokens_per_block && t < args.tokens; ++t)
      keep_row<kThreads>(args, t);
  }

  // Maxima may be taken in any order: a NaN among the scores makes the result NaN either way, as
  // its own probability is.
  DSV4_DEVICE static void pool(const Params& args, int64_t token, const TokenPlan& plan,
                               int first_channel, Shared& shared) {
    const PoolRows rows = PoolRows::of(args, plan);
    const int begin = rows.begin(args), end = args.pooled_tokens();
    const int row_lane = thread_idx() % kRowLanes, pass_row = thread_idx() / kRowLanes;
    const int channel = first_channel + row_lane * kLaneChannels;
    const bool one_tile = end - begin <= kTileRows;
    Quad score[kPasses], value[kPasses];
    Quad largest;
    DSV4_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) largest.channel[c] = -kInfinity;
    const auto load_tile = [&](int tile) {
      DSV4_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const PoolRow row = rows.row(args, tile + pass * kPassRows + pass_row);
        score[pass] = score_of(row, channel);
        value[pass] = load_quad(row.value + channel);
      }
    };
    for (int tile = begin; tile < end; tile += kTileRows) {
      load_tile(tile);
      DSV4_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        if (tile + pass * kPassRows + pass_row >= end) continue;
        DSV4_UNROLL
        for (int c = 0; c < kLaneChannels; ++c)
          largest.channel[c] = max(largest.channel[c], score[pass].channel[c]);
      }
    }
    DSV4_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) {
      for (int distance = kRowLanes; distance < kGroupLanes; distance *= 2)
        largest.channel[c] = max(largest.channel[c], shuffle_xor(largest.channel[c], distance));
    }
    if (group_lane() < kRowLanes) shared.largest[group_idx()][row_lane] = largest;
    block_sync();  // the sums of the token before are done, too
    DSV4_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      DSV4_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) {
        largest.channel[c] = max(largest.channel[c], shared.largest[g][row_lane].channel[c]);
      }
    }

    PoolSum total{};  // of channel first_channel + group_lane(), in the first group
    for (int tile = begin; tile < end; tile += kTileRows) {
      if (!one_tile) {
        load_tile(tile);
        block_sync();  // the tile before has been added up
      }
      DSV4_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int r = pass * kPassRows + pass_row;
        if (tile + r >= end) continue;
        Quad p;
        DSV4_UNROLL
        for (int c = 0; c < kLaneChannels; ++c)
          p.channel[c] = exp_not_positive(score[pass].channel[c] - largest.channel[c]);
        shared.p[r][row_lane] = p;
        shared.value[r][row_lane] = value[pass];
      }
      block_sync();
      if (group_idx() == 0) {
        const int count = end - tile < kTileRows ? end - tile : kTileRows;
        const int lane = group_lane() / kLaneChannels, c = group_lane() % kLaneChannels;
        DSV4_UNROLL_BY(8)
        for (int r = 0; r < count; ++r)
          total.add(shared.p[r][lane].channel[c], shared.value[r][lane].channel[c]);
      }
    }
    if (group_idx() == 0)
      args.pooled[token * args.width + first_channel + group_lane()] = total.result();
  }

  static constexpr float kInfinity = std::bit_cast<float>(0x7f800000u);
};

/// Blocks [0, entry_blocks): entries, a group each. The others: ring rows.
template <typename CacheRows, int kVectors>
struct CompressFinish {
  using Params = CompressArgs;
  static constexpr int kThreads = 256;
  static constexpr int kEntries = kThreads / kGroupLanes;

  DSV4_DEVICE static void run(const Params& args) {
    if (block_idx() < args.entry_blocks) {
      const int64_t token = block_idx() * kEntries + group_idx();
      if (token >= args.tokens) return;
      const int64_t slot = args.slots[token];
      const int32_t position = args.positions[token];  // beside the slot, not after it
      if (slot >= 0) finish(args, token, slot, position);
      return;
    }
    const int64_t begin = (block_idx() - args.entry_blocks) * args.ring_tokens_per_block;
    for (int64_t t = begin; t < begin + args.ring_tokens_per_block && t < args.tokens; ++t)
      keep_row<kThreads>(args, t);
  }

  DSV4_DEVICE static void finish(const Params& args, int64_t token, int64_t slot, int32_t last) {
    const int32_t position = entry_position(args, last);
    const auto row =
        load_row<kVectors, Access::kPairs>(args.pooled + token * args.width, args.width);
    const auto weight =
        load_weights<kVectors, Access::kPairs>(args.norm, args.norm_is_bf16, args.width);
    finish_entry<CacheRows>(args, token, slot, row, entry_factor(args, row), weight,
                            [&](int p) { return rope_angle(position, args.rope.frequencies[p]); });
  }
};

}  // namespace dsv4::gpu
