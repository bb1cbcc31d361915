// Host side of sm90_attend: which kernel serves which tokens of a call.
#include "backends/nvidia/ops/attend_sm90.h"

#include <algorithm>
#include <atomic>

#include "backends/nvidia/ops/attend_sm90_heads.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/tensor_map.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kTileHeads = 64;
constexpr int kHeadDim = 512;
constexpr int64_t kManyRounds = 4;  // of items: a call's beginning and end are little of it
constexpr int kRopeDim = 64;        // angles of a warp: a pair of dims a lane
constexpr int64_t kChainBytes = kTileHeads * kHeadDim * 4;
/// Most partial results of 64 heads at a time, 128 MiB of them; more tokens go in waves.
constexpr int64_t kMaxChainResults = 1024;

// Those that leave something for later, or for each other.
int persistent_ctas() {
  return std::min(num_multiprocessors(), kMaxPersistentCtas);
}

int log2_tiles_of(int num_heads) {
  return num_heads > kTileHeads ? 1 : 0;
}

int64_t tokens_per_wave(int64_t num_tokens, int log2_tiles, int64_t max_chains, int tile_heads) {
  if (max_chains == 1) return num_tokens;
  const int64_t results = kMaxChainResults * (kTileHeads / tile_heads);
  return std::clamp<int64_t>(results / (max_chains << log2_tiles), 1, num_tokens);
}

// The same call for tokens [begin, begin + count).
AttendArgs tokens_of(const AttendArgs& args, int64_t begin, int64_t count) {
  AttendArgs out = args;
  out.num_tokens = static_cast<int32_t>(count);
  out.q += begin * args.q_token_stride;
  out.out += begin * args.out_token_stride;
  if (out.lse != nullptr) out.lse += begin * args.num_heads;
  if (out.token_to_seq != nullptr) out.token_to_seq += begin;
  for (RowSource* rows : {&out.window, &out.compressed}) {
    if (rows->kind == RowSource::kRange) rows->begin += begin;
    if (rows->kind == RowSource::kList) rows->slots += begin * rows->slots_stride;
    if (rows->kind != RowSource::kNone) rows->end += begin;
  }
  return out;
}

// The more CTAs share an item the better, as long as all items run at once. A cluster takes
// one part, and makes no codes.
template <KvFormat kFormat>
void launch_items(const AttendSm90Args& args, cudaStream_t stream) {
  if (args.first_parts != nullptr || args.hand_overs != nullptr) {
    const int grid = std::min(args.num_items, persistent_ctas());
    return launch_attend_sm90<kFormat>(args, grid, stream);
  }
  if (args.num_items > attend_sm90_clusters<kFormat, 2>()) {
    const int grid = std::min(args.num_items, num_multiprocessors());
    return launch_attend_sm90<kFormat>(args, grid, stream);
  }
  DSV4_CHECK(args.codes.scale == nullptr && !args.raw_queries);
  if (args.num_items <= attend_sm90_clusters<kFormat, 8>()) {
    return launch_attend_sm90_cluster<kFormat, 8>(args, stream);
  }
  if (args.num_items <= attend_sm90_clusters<kFormat, 4>()) {
    return launch_attend_sm90_cluster<kFormat, 4>(args, stream);
  }
  launch_attend_sm90_cluster<kFormat, 2>(args, stream);
}

void launch(const AttendSm90Args& args, KvFormat format, cudaStream_t stream) {
  switch (format) {
    case KvFormat::kFp8DsMla:
      return launch_items<KvFormat::kFp8DsMla>(args, stream);
    case KvFormat::kBf16:
      return launch_items<KvFormat::kBf16>(args, stream);
    default:
      return launch_items<KvFormat::kFp8>(args, stream);
  }
}

KvFormat format_of(const AttendArgs& args) {
  return args.window.kind != RowSource::kNone ? args.window.format : args.compressed.format;
}

}  // namespace

const char* attend_sm90_why_not(const AttendArgs& args) {
  if (args.head_dim != kHeadDim) return "head_dim is not 512";
  if (args.num_heads > 2 * kTileHeads) return "more than 128 heads";
  if (!args.round_p) return "P must stay f32";
  // The maximum that weights refer to moves in steps; the true one is not kept.
  if (args.max_logits != nullptr) return "the largest logit is asked for";
  if (args.rows_per_block != 64) return "blocks are not of 64 rows";
  if (args.window.kind != RowSource::kNone && args.compressed.kind != RowSource::kNone &&
      args.window.format != args.compressed.format) {
    return "window and compressed rows differ in format";
  }
  // RowAddress: scale bytes lie less than 2^22 bytes behind their row.
  if (std::max(args.window.rows_per_block, args.compressed.rows_per_block) > (1 << 22) / 576) {
    return "pages of more than 7281 rows";
  }
  AttendArgs without_rows = args;
  without_rows.window = without_rows.compressed = {};
  if (!is_aligned_16(without_rows)) return "q or out are not 16-byte aligned";
  const int64_t alignment = format_of(args) == KvFormat::kFp8DsMla ? 8 : 16;
  for (const RowSource* rows : {&args.window, &args.compressed}) {
    if ((reinterpret_cast<uintptr_t>(rows->base) |
         static_cast<uintptr_t>(rows->block_stride_bytes)) %
            alignment !=
        0) {
      return "rows are not 16-byte aligned (fp8_ds_mla: 8)";
    }
  }
  return "";
}

namespace {

// Of at most 64 heads: more tiles fill the multiprocessors, and what a merge costs every long list
// (9 us) is more than few tokens gain.
bool has_parts(const AttendArgs& args) {
  return args.num_heads <= kTileHeads && args.blocks_per_chain == 2 * kPartBlocks &&
         args.max_blocks > kPartBlocks;
}

// The same call with parts as chains.
AttendArgs dealt_in_parts(const AttendArgs& args) {
  AttendArgs out = args;
  if (has_parts(args)) {
    out.blocks_per_chain = kPartBlocks;
    out.max_chains = (args.max_blocks + kPartBlocks - 1) / kPartBlocks;
  }
  return out;
}

// Clusters of which all run at once.
template <int kCtas>
int num_clusters(KvFormat format) {
  switch (format) {
    case KvFormat::kFp8DsMla:
      return attend_sm90_clusters<KvFormat::kFp8DsMla, kCtas>();
    case KvFormat::kBf16:
      return attend_sm90_clusters<KvFormat::kBf16, kCtas>();
    default:
      return attend_sm90_clusters<KvFormat::kFp8, kCtas>();
  }
}

enum class Kernels { kBest, kFewHeads, kManyHeads };  // all with the same bits

// Heads of a tile of the kernel for few heads, or 0 where the one for 64 takes the call: its
// clusters are faster while there are few items of more than a few blocks; with 2 CTAs an item they
// beat tiles of 32 heads, and those of 16 on long lists (docs/kernels/attend_sm90_heads.md).
int few_heads_tile(const AttendArgs& args, Kernels kernels) {
  constexpr int kShortBlocks = 2, kManyBlocks = 8, kLongBlocks = 16;
  const int tile = kernels == Kernels::kManyHeads ? 0 : attend_sm90_heads_tile(args);
  if (tile == 0 || kernels == Kernels::kFewHeads) return tile;
  if (args.max_blocks <= kShortBlocks) return tile;
  const KvFormat format = format_of(args);
  const int64_t items = int64_t{args.num_tokens} * args.max_chains;
  int most = num_clusters<4>(format);
  if (tile > 16 || (args.max_chains == 1 && args.max_blocks >= kLongBlocks)) {
    most = num_clusters<2>(format);
  } else if (args.max_chains == 1 && args.max_blocks >= kManyBlocks) {
    most = std::max(most, num_clusters<2>(format) * 3 / 4);
  }
  return items <= most ? 0 : tile;
}

// Of `count` tokens those whose items fill all multiprocessors, round after round. The others are
// fewer than a round, which takes as long however many there are, so that clusters serve them
// sooner; not where that saves less than a launch costs.
int64_t tokens_of_full_rounds(KvFormat format, int64_t count, int64_t items_of_token,
                              int64_t blocks_of_item) {
  const int64_t round = num_multiprocessors();
  const int64_t full = count * items_of_token / round * round / items_of_token;
  if (full == 0 || full == count) return count;
  const int64_t items = (count - full) * items_of_token;
  if (blocks_of_item >= 8 && items <= num_clusters<4>(format)) return full;
  if (blocks_of_item >= 16 && items <= num_clusters<2>(format)) return full;
  return count;
}

// Blocks of an item, at most, where they are dealt out instead of items, else 0: where that spares
// multiprocessors more idle time than a hand-over takes. Not for so many rounds that it is little
// of a call, nor for two tiles a token, which read its rows from the L2 at the same time.
int32_t dealt_blocks(const AttendArgs& args) {
  constexpr int kWindowBlocks = 2, kHandOver = 4, kMostRounds = 8;
  const int64_t ctas = persistent_ctas(), items = args.num_tokens;
  const int64_t blocks = args.max_blocks + kWindowBlocks;
  if (args.num_heads > kTileHeads || args.max_chains > 1) return 0;
  if (items <= ctas || items > kMostRounds * ctas) return 0;
  const int64_t idle = round_up(items, ctas) - items;
  return idle * blocks > kHandOver * ctas ? static_cast<int32_t>(blocks) : 0;
}

// Who takes a call, and in which items.
struct Split {
  AttendArgs all;
  int few_heads;  // heads of a tile of the kernel for few heads, or 0
  int log2_tiles;
  int64_t items_of_token;
  bool has_parts;        // in an item
  int32_t dealt_blocks;  // or 0
};
Split split_of(const AttendArgs& call, Kernels kernels) {
  Split out;
  const AttendArgs in_parts = dealt_in_parts(call);
  out.few_heads = few_heads_tile(in_parts, kernels);
  // Where there are more of them than multiprocessors, a CTA takes both parts of a chain; results
  // of few heads are small.
  const bool parts_fit =
      int64_t{in_parts.num_tokens} * in_parts.max_chains <= num_multiprocessors();
  out.all = out.few_heads > 0 || parts_fit ? in_parts : call;
  out.log2_tiles = log2_tiles_of(call.num_heads);
  out.items_of_token = int64_t{out.all.max_chains} << out.log2_tiles;
  out.has_parts = out.few_heads == 0 && has_parts(out.all);
  out.dealt_blocks = out.few_heads == 0 && !out.has_parts ? dealt_blocks(out.all) : 0;
  return out;
}
// Of `count` tokens the first ones, which one launch serves; the others have a launch of their own.
int64_t first_tokens(const Split& split, const AttendParams& params, int64_t count) {
  if (split.has_parts || split.dealt_blocks > 0) return count;  // clusters take one part,
  // make no codes, and want queries normed
  if (params.out.dtype == DType::kF8E4M3 || params.raw_queries) return count;
  const int64_t blocks_of_item =
      std::min<int64_t>(ceil_div(params.max_entries, int64_t{64}), split.all.blocks_per_chain);
  return tokens_of_full_rounds(format_of(split.all), count, split.items_of_token, blocks_of_item);
}

// As values: what a call is where its outputs are codes.
AttendParams with_values(AttendParams params) {
  if (params.out.dtype == DType::kF8E4M3) params.out.dtype = DType::kBf16;
  return params;
}

void run_attend_sm90(const AttendParams& params, Kernels kernels, const OpContext& context) {
  const AttendArgs call = attend_args(with_values(params));
  if (*attend_sm90_why_not(call) != '\0') {
    DSV4_CHECK(!params.raw_queries);
    return attend_sm80(params, context);
  }
  const bool codes = params.out.dtype == DType::kF8E4M3;
  const Split split = split_of(call, kernels);
  const AttendArgs& all = split.all;
  const int few_heads = split.few_heads, log2_tiles = split.log2_tiles;
  const int64_t items_of_token = split.items_of_token;
  DSV4_CHECK(!codes || (few_heads == 0 && all.max_chains == 1));
  const int tile_heads = few_heads > 0 ? few_heads : kTileHeads;
  int64_t wave = tokens_per_wave(all.num_tokens, log2_tiles, all.max_chains, tile_heads);
  Arena::Scope scope(*context.scratch);
  AttendSm90Args args;
  args.log2_tiles = log2_tiles;
  args.raw_queries = params.raw_queries;
  args.query_eps = params.query_eps;
  ChainResults chains;
  if (all.max_chains > 1) {
    const int64_t heads = wave * items_of_token * tile_heads;
    chains.values = context.scratch->take_array<float4>(heads * kHeadDim / 4);
    chains.sums = context.scratch->take_array<float2>(heads);
  }
  std::byte* unfinished = nullptr;
  if (few_heads > 0) {
    const int64_t bytes = attend_sm90_heads_hand_over_bytes(all, all.num_tokens * items_of_token);
    if (bytes > 0) unfinished = context.scratch->take(bytes);
  }
  args.results_per_chain = call.blocks_per_chain / all.blocks_per_chain;
  if (split.has_parts) {
    args.part_rows = kPartBlocks * all.rows_per_block;
    args.first_parts = context.scratch->take_array<FirstPart>(persistent_ctas());
  }
  args.dealt_blocks = split.dealt_blocks;
  if (args.dealt_blocks > 0) {
    args.hand_overs = context.scratch->take_array<HandOver>(persistent_ctas());
  }
  if (few_heads == 0) {
    args.weights = context.scratch->take_array<std::byte>(kMaxPersistentCtas * kClusterWeightBytes);
  }
  if (context.scratch->measuring() || all.num_tokens == 0) return;
  if (wave < all.num_tokens && wave * items_of_token >= num_multiprocessors()) {
    // As many rounds of all multiprocessors as fit.
    const int64_t rounds = wave * items_of_token / num_multiprocessors();
    wave = std::max<int64_t>(1, rounds * num_multiprocessors() / items_of_token);
  }

  if (args.hand_overs != nullptr) args.mark = next_mark();
  args.wide_rows = is_aligned_16(all);
  args.starts_early =
      all.window.kind != RowSource::kList && all.compressed.kind != RowSource::kList;
  args.window_rows = FastDivisor(all.window.rows_per_block);
  args.window_columns = FastDivisor(all.window.columns);
  args.compressed_rows = FastDivisor(all.compressed.rows_per_block);
  args.compressed_columns = FastDivisor(all.compressed.columns);
  // `count` tokens from `begin` on; their results lie behind those of `before` others.
  const auto choose_tokens = [&](int64_t begin, int64_t count, int64_t before) {
    args.attend = tokens_of(all, begin, count);
    args.chain_items = FastDivisor(static_cast<int32_t>(count << log2_tiles));
    args.num_items = static_cast<int32_t>(count * items_of_token);
    args.chains = chains;
    if (chains.values != nullptr) {
      const int64_t heads = before * items_of_token * tile_heads;
      args.chains.values += heads * kHeadDim / 4;
      args.chains.sums += heads;
    }
  };
  const cudaStream_t stream = stream_of(context.stream);
  for (int64_t begin = 0; begin < all.num_tokens; begin += wave) {
    const int64_t count = std::min(wave, all.num_tokens - begin);
    if (few_heads > 0) {
      choose_tokens(begin, count, 0);
      attend_sm90_heads(args, format_of(all), unfinished, stream);
      continue;
    }
    const int64_t first = first_tokens(split, params, count);
    int64_t before = 0;
    for (const int64_t tokens : {first, count - first}) {
      if (tokens == 0) continue;
      const int64_t from = begin + before, out_bytes = size_of(params.out.dtype);
      choose_tokens(from, tokens, before);
      before += tokens;
      args.q_map = byte_map_3d(args.attend.q, 2 * all.q_head_stride, 2 * all.q_token_stride, tokens,
                               all.num_heads, 2 * kHeadDim, kTileHeads);
      args.out_map =
          byte_map_3d(params.out.as<std::byte>() + from * all.out_token_stride * out_bytes,
                      out_bytes * all.out_head_stride, out_bytes * all.out_token_stride, tokens,
                      all.num_heads, out_bytes * kHeadDim, kTileHeads);
      if (codes || params.raw_queries) {
        args.rotation = {params.rotation.positions + from, params.rotation.rope.frequencies};
      }
      if (codes) args.codes = {params.scale.data + from, params.scale.stride};
      launch(args, format_of(all), stream);
    }
    if (all.max_chains > 1) {
      choose_tokens(begin, count, 0);
      merge_chains_sm90(args, stream);
    }
  }
}

}  // namespace

bool attend_sm90_makes_codes(const AttendParams& params) {
  const Tensor& out = params.out;
  const AttendArgs call = attend_args(with_values(params));
  if (*attend_sm90_why_not(call) != '\0' || params.rotation.rope.rope_dim != kRopeDim ||
      out.shape[1] != call.num_heads ||
      (reinterpret_cast<uintptr_t>(out.data) | static_cast<uintptr_t>(out.strides[0]) |
       static_cast<uintptr_t>(out.strides[1])) %
              16 !=
          0)
    return false;
  // A last round that is not full takes clusters less time: in few rounds more than a launch.
  const Split split = split_of(call, Kernels::kBest);
  const int64_t items = call.num_tokens * split.items_of_token;
  return split.few_heads == 0 && split.all.max_chains == 1 &&
         (split.has_parts || items > num_clusters<2>(format_of(call))) &&
         (items >= kManyRounds * num_multiprocessors() ||
          first_tokens(split, with_values(params), call.num_tokens) == call.num_tokens);
}

bool attend_sm90_takes_raw_queries(const AttendParams& params) {
  const AttendArgs call = attend_args(with_values(params));
  if (*attend_sm90_why_not(call) != '\0' || params.rotation.rope.rope_dim != kRopeDim ||
      format_of(call) != KvFormat::kFp8DsMla)
    return false;
  const Split split = split_of(call, Kernels::kBest);
  return split.few_heads == 0 && split.all.max_chains == 1 && split.dealt_blocks == 0 &&
         call.num_tokens * split.items_of_token >= kManyRounds * num_multiprocessors();
}

void attend_sm90(const AttendParams& params, const OpContext& context) {
  run_attend_sm90(params, Kernels::kBest, context);
}
void attend_sm90_few_heads(const AttendParams& params, const OpContext& context) {
  run_attend_sm90(params, Kernels::kFewHeads, context);
}
void attend_sm90_many_heads(const AttendParams& params, const OpContext& context) {
  run_attend_sm90(params, Kernels::kManyHeads, context);
}

// The finaliser of splitmix64, which maps no two numbers to one, nor any but 0 to 0.
uint64_t next_mark() {
  static std::atomic<uint64_t> launches{0};
  uint64_t x = launches.fetch_add(1, std::memory_order_relaxed) + 1;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

int64_t attend_sm90_scratch_bytes(const ScratchLimits& limits, int64_t max_entries) {
  constexpr ReductionGrid kGrid;
  const int64_t max_blocks = ceil_div(max_entries, int64_t{kGrid.rows_per_block});
  if (limits.max_tokens == 0) return 0;
  // What few heads hand over, or what CTAs hand over and clusters exchange.
  const int64_t shared =
      2 * Arena::kAlignment +
      std::max(attend_sm90_heads_max_hand_over_bytes(),
               kMaxPersistentCtas * int64_t{kClusterWeightBytes + sizeof(HandOver)});
  if (max_blocks <= kPartBlocks) return shared;
  // Of any call within the limits, also one with fewer chains and longer waves, or in parts.
  const int64_t of_token = ceil_div(max_blocks, int64_t{kGrid.blocks_per_chain})
                           << log2_tiles_of(limits.num_heads);
  int64_t results = std::min(limits.max_tokens * of_token, std::max(kMaxChainResults, of_token));
  results = std::max<int64_t>(results, kMaxPersistentCtas);
  return results * (kChainBytes + kTileHeads * 8) +
         kMaxPersistentCtas * int64_t{sizeof(FirstPart)} + 3 * Arena::kAlignment + shared;
}

}  // namespace dsv4::nvidia
