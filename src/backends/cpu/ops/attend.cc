// Driver of attention: cuts a step into items, runs the candidate's kernels over their blocks,
// merges chains. See attend.h for the order of every sum.
#include "backends/cpu/ops/attend.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/attend_arith.h"
#include "backends/cpu/parallel.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

// An item takes at most this many partial chains at once when a token's chains are spread.
constexpr int kPartialsPerThread = 4;

bool exact_in_bf16(const CacheView& cache) {
  return cache.format == KvFormat::kFp8DsMla || cache.format == KvFormat::kBf16 ||
         cache.format == KvFormat::kFp8;
}

bool all_bf16(const AttendParams& params) {
  if (params.q.dtype != DType::kBf16 || !params.round_p_to_bf16) return false;
  const auto exact = [](const auto& rows) {
    if constexpr (std::is_same_v<decltype(rows), const std::monostate&>) {
      return true;
    } else {
      return !rows.cache || exact_in_bf16(rows.cache);
    }
  };
  return std::visit(exact, params.window) && std::visit(exact, params.compressed);
}

// Sizes and carving of scratch. Everything is a multiple of 64 bytes.
struct Layout {
  int64_t dim, elem_bytes;
  int64_t block_bytes() const { return kMaxBlockRows * (dim + kRowPadElems) * elem_bytes; }
  int64_t scores_bytes() const { return kScoresElems * 4; }
  int64_t q_bytes() const { return kGroupHeads * dim * elem_bytes; }
  int64_t o_bytes() const { return kGroupHeads * dim * 4; }
  int64_t group_bytes() const { return q_bytes() + 2 * o_bytes(); }
  int64_t thread_bytes(int groups) const {
    return 2 * block_bytes() + (kMaxItemGroups + 1) * scores_bytes() + groups * group_bytes();
  }
};

// What a chain leaves behind when its token's chains are spread over threads.
struct PartialState {
  alignas(64) float max[kGroupHeads];
  alignas(64) float sum[kGroupHeads];
  bool any;
};

class Attend {
 public:
  Attend(const AttendKernel& kernel, const AttendParams& params, const OpContext& context)
      : kernel_(kernel),
        params_(params),
        context_(context),
        shape_{static_cast<int>(params.q.shape[2]), log2_scale(params.softmax_scale),
               params.round_p_to_bf16},
        heads_(static_cast<int>(params.q.shape[1])),
        threads_(num_threads(context.stream)),
        layout_{params.q.shape[2], kernel.elem_bytes} {}

  void run() {
    const int64_t tokens = params_.q.shape[0];
    Arena& arena = *context_.scratch;
    Arena::Scope scope(arena);
    const int64_t chains = chains_to_spread(tokens);
    plan_items(tokens, chains);
    thread_bytes_ = layout_.thread_bytes(groups_per_item_);
    scratch_ = arena.take(thread_bytes_ * threads_);
    const int64_t items = tokens * items_per_token_;
    if (chains > 1) {
      run_spread(items, chains);
      return;
    }
    if (arena.measuring()) return;
    parallel_chunks(context_.stream, items, 1, [&](int64_t begin, int64_t end, int thread_idx) {
      for (int64_t item = begin; item < end; ++item) run_item(item, thread_idx);
    });
  }

 private:
  // The number of chains when there are too few (token, group) items for the threads, else 1.
  int64_t chains_to_spread(int64_t tokens) const {
    const int64_t items = tokens * ceil_div(heads_, kernel_.group_heads);
    if (threads_ == 1 || items >= int64_t{kPartialsPerThread} * threads_) return 1;
    if (context_.scratch->measuring()) return std::numeric_limits<int32_t>::max();
    int64_t chains = 1;
    for (int64_t t = 0; t < tokens; ++t) {
      chains = std::max(chains, TokenBlocks(params_, t).num_chains());
    }
    return chains;
  }
  // A dequantised block serves all heads of an item; items shrink only to occupy the threads.
  void plan_items(int64_t tokens, int64_t chains) {
    group_heads_ = kernel_.group_heads;
    const int64_t groups = ceil_div(heads_, group_heads_);
    if (chains > 1) {
      int64_t least = std::numeric_limits<int64_t>::max();
      for (int per_item = kMaxItemGroups; per_item >= 1; per_item /= 2) {
        if (groups % per_item != 0) continue;
        const int64_t cost = spread_cost(tokens * (groups / per_item), per_item, chains);
        if (cost >= least) continue;
        least = cost;
        groups_per_item_ = per_item;
      }
    } else {
      const int64_t most = std::min<int64_t>(kMaxItemGroups, groups);
      groups_per_item_ = 1;
      const int64_t enough_items = threads_ == 1 ? 1 : 2 * threads_;
      if (tokens * ceil_div(heads_, most * group_heads_) >= enough_items) {
        groups_per_item_ = static_cast<int>(most);
      } else if (tokens * groups < threads_) {
        group_heads_ = 16;
      }
    }
    items_per_token_ = ceil_div(heads_, groups_per_item_ * group_heads_);
  }
  // Chains of an item that a wave of spread chains holds.
  int64_t wave_chains(int64_t items, int per_item) const {
    return ceil_div(int64_t{kPartialsPerThread} * threads_, items * per_item);
  }
  // Time of spread chains, in chains that the busiest thread runs: to dequantise a block takes an
  // eighth of what a group does with it.
  int64_t spread_cost(int64_t items, int per_item, int64_t chains) const {
    const int64_t width = wave_chains(items, per_item);
    const int64_t rounds = chains / width * ceil_div(items * width, threads_) +
                           ceil_div(items * (chains % width), threads_);
    return rounds * (8 * per_item + 1);
  }

  AttendScratch block_scratch(int thread_idx, std::byte*& rest) const {
    rest = scratch_ + thread_bytes_ * (threads_ == 1 ? 0 : thread_idx);
    const auto carve = [&](int64_t bytes) { return std::exchange(rest, rest + bytes); };
    AttendScratch out;
    out.k = carve(layout_.block_bytes());
    out.v = carve(layout_.block_bytes());
    out.scores = reinterpret_cast<float*>(carve(kMaxItemGroups * layout_.scores_bytes()));
    out.p = reinterpret_cast<float*>(carve(layout_.scores_bytes()));
    return out;
  }

  int first_head(int64_t item) const {
    return static_cast<int>(item % items_per_token_) * groups_per_item_ * group_heads_;
  }
  // Opens the groups of an item: packed q, empty totals.
  int open_groups(int64_t item, std::byte* rest, AttendGroup* groups) const {
    const int64_t token = item / items_per_token_;
    int count = 0;
    for (int head = first_head(item); head < heads_ && count < groups_per_item_;
         head += group_heads_, ++count) {
      AttendGroup& group = groups[count];
      const auto carve = [&](int64_t bytes) { return std::exchange(rest, rest + bytes); };
      group.q = carve(layout_.q_bytes());
      group.o = reinterpret_cast<float*>(carve(layout_.o_bytes()));
      group.total_o = reinterpret_cast<float*>(carve(layout_.o_bytes()));
      group.heads = std::min(group_heads_, heads_ - head);
      group.has_total = false;
      const auto* q =
          static_cast<const char*>(params_.q.data) +
          (token * params_.q.strides[0] + head * params_.q.strides[1]) * size_of(params_.q.dtype);
      kernel_.pack_q(q, params_.q.dtype, params_.q.strides[1], group.heads, shape_.head_dim,
                     group.q);
    }
    return count;
  }

  void reset_chain(AttendGroup& group) const {
    std::fill_n(group.max, kGroupHeads, kMinusInfinity);
    std::fill_n(group.sum, kGroupHeads, 0.0f);
    std::fill_n(group.o, layout_.o_bytes() / 4, 0.0f);
  }

  static void take_first(AttendGroup& group, const float* chain_max, const float* chain_sum) {
    std::copy_n(chain_max, kGroupHeads, group.total_max);
    std::copy_n(chain_sum, kGroupHeads, group.total_sum);
    group.has_total = true;
  }
  // Adds a further chain to the total of its group.
  void merge_chain(AttendGroup& group, const float* chain_o, const float* chain_max,
                   const float* chain_sum) const {
    float by_total[kGroupHeads], by_chain[kGroupHeads];
    for (int h = 0; h < group.heads; ++h) {
      const MergeWeights w =
          merge_weights(group.total_max[h], group.total_sum[h], chain_max[h], chain_sum[h]);
      group.total_max[h] = w.max;
      group.total_sum[h] = w.sum;
      by_total[h] = w.total;
      by_chain[h] = w.chain;
    }
    kernel_.merge(group.total_o, chain_o, by_total, by_chain, group.heads, shape_.head_dim);
  }

  // Runs the chains that `blocks` has selected for all groups of an item; calls close() after each
  // chain that had an unmasked row.
  template <typename Close>
  void run_chains(TokenBlocks& blocks, const AttendScratch& scratch, AttendGroup* groups,
                  int num_groups, Close close) const {
    BlockRows buffers[2];
    int64_t chain = 0, next_chain = 0, open_chain = -1;
    int at = 0;
    bool more = blocks.next(buffers[0], chain);
    while (more) {
      const BlockRows& block = buffers[at];
      more = blocks.next(buffers[at ^ 1], next_chain);
      if (chain != open_chain) {
        for (int g = 0; g < num_groups; ++g) reset_chain(groups[g]);
        open_chain = chain;
      }
      kernel_.attend_block(block, more ? &buffers[at ^ 1] : nullptr, shape_, scratch, groups,
                           num_groups);
      if (!more || next_chain != chain) close();
      chain = next_chain;
      at ^= 1;
    }
  }

  void finish_group(int64_t item, int group_idx, const AttendGroup& group) const {
    const int64_t token = item / items_per_token_;
    const int head = first_head(item) + group_idx * group_heads_;
    const DType dtype = params_.out.dtype;
    char* out = static_cast<char*>(params_.out.data) +
                (token * params_.out.strides[0] + head * params_.out.strides[1]) * size_of(dtype);
    const auto of_heads = [&](float* array) {
      return array == nullptr ? nullptr : array + token * heads_ + head;
    };
    float *lse = of_heads(params_.lse), *max_logits = of_heads(params_.max_logits);
    if (!group.has_total) {
      for (int h = 0; h < group.heads; ++h) {
        std::fill_n(out + h * params_.out.strides[1] * size_of(dtype),
                    shape_.head_dim * size_of(dtype), char{0});
        if (lse != nullptr) lse[h] = kMinusInfinity;
        if (max_logits != nullptr) max_logits[h] = kMinusInfinity;
      }
      return;
    }
    float factor[kGroupHeads];
    for (int h = 0; h < group.heads; ++h) {
      const float sink = params_.sink == nullptr ? kMinusInfinity : params_.sink[head + h];
      factor[h] = inverse_denominator(group.total_max[h], group.total_sum[h], sink);
      if (lse != nullptr) lse[h] = log_sum_exp(group.total_max[h], group.total_sum[h]);
      if (max_logits != nullptr) max_logits[h] = natural_max(group.total_max[h]);
    }
    kernel_.finish(group.total_o, factor, group.heads, shape_.head_dim, dtype, out,
                   params_.out.strides[1]);
  }

  void run_item(int64_t item, int thread_idx) const {
    FlushSubnormals flush_subnormals;
    std::byte* rest;
    const AttendScratch scratch = block_scratch(thread_idx, rest);
    AttendGroup groups[kMaxItemGroups];
    const int num_groups = open_groups(item, rest, groups);
    TokenBlocks blocks(params_, item / items_per_token_);
    run_chains(blocks, scratch, groups, num_groups, [&] {
      for (int g = 0; g < num_groups; ++g) {
        AttendGroup& group = groups[g];
        if (group.has_total) {
          merge_chain(group, group.o, group.max, group.sum);
        } else {
          std::swap(group.o, group.total_o);
          take_first(group, group.max, group.sum);
        }
      }
    });
    for (int g = 0; g < num_groups; ++g) finish_group(item, g, groups[g]);
  }

  // One chain of an item, left in `states` and `o`, one after another for its groups.
  void run_partial(int64_t item, int64_t chain, int thread_idx, PartialState* states,
                   float* o) const {
    FlushSubnormals flush_subnormals;
    for (int g = 0; g < groups_per_item_; ++g) states[g].any = false;
    TokenBlocks blocks(params_, item / items_per_token_);
    if (chain >= blocks.num_chains()) return;
    blocks.select_chains(chain, chain + 1);
    std::byte* rest;
    const AttendScratch scratch = block_scratch(thread_idx, rest);
    AttendGroup groups[kMaxItemGroups];
    const int num_groups = open_groups(item, rest, groups);
    for (int g = 0; g < num_groups; ++g) groups[g].o = o + g * (layout_.o_bytes() / 4);
    run_chains(blocks, scratch, groups, num_groups, [&] {
      for (int g = 0; g < num_groups; ++g) {
        states[g].any = true;
        std::copy_n(groups[g].max, kGroupHeads, states[g].max);
        std::copy_n(groups[g].sum, kGroupHeads, states[g].sum);
      }
    });
  }

  // Few items, several chains: waves of (item, chain) in parallel, each followed by merging in
  // ascending order. A wave is as wide as the partial states that scratch holds.
  void run_spread(int64_t items, int64_t chains) const {
    const int64_t width = wave_chains(items, groups_per_item_), per_item = groups_per_item_;
    const int64_t o_elems = layout_.o_bytes() / 4;
    Arena& arena = *context_.scratch;
    // States are [item][chain of the wave][group], groups [item][group].
    float* partial_o = arena.take_array<float>(items * width * per_item * o_elems);
    auto* partials = arena.take_array<PartialState>(items * width * per_item);
    float* totals = arena.take_array<float>(items * per_item * o_elems);
    auto* groups = arena.take_array<AttendGroup>(items * per_item);
    if (arena.measuring()) return;
    for (int64_t i = 0; i < items * per_item; ++i) {
      const int head = first_head(i / per_item) + static_cast<int>(i % per_item) * group_heads_;
      groups[i].total_o = totals + i * o_elems;
      groups[i].heads = std::min(group_heads_, heads_ - head);
      groups[i].has_total = false;
    }
    for (int64_t first = 0; first < chains; first += width) {
      const int64_t wave = std::min(width, chains - first);
      parallel_chunks(context_.stream, items * wave, 1, [&](int64_t i, int64_t, int thread_idx) {
        const int64_t item = i / wave, state = (item * width + i % wave) * per_item;
        run_partial(item, first + i % wave, thread_idx, partials + state,
                    partial_o + state * o_elems);
      });
      parallel_chunks(context_.stream, items * per_item, 1, [&](int64_t i, int64_t, int) {
        FlushSubnormals flush_subnormals;
        const int64_t item = i / per_item, group_idx = i % per_item;
        AttendGroup& group = groups[i];
        for (int64_t chain = 0; chain < wave; ++chain) {
          const int64_t state = (item * width + chain) * per_item + group_idx;
          const PartialState& partial = partials[state];
          const float* o = partial_o + state * o_elems;
          if (!partial.any) continue;
          if (group.has_total) {
            merge_chain(group, o, partial.max, partial.sum);
          } else {
            std::copy_n(o, o_elems, group.total_o);
            take_first(group, partial.max, partial.sum);
          }
        }
        if (first + wave == chains) finish_group(item, static_cast<int>(group_idx), group);
      });
    }
  }

  const AttendKernel& kernel_;
  const AttendParams& params_;
  const OpContext& context_;
  AttendShape shape_;
  int heads_;
  int threads_;
  Layout layout_;
  int group_heads_ = kGroupHeads;
  int groups_per_item_ = 1;
  int64_t items_per_token_ = 1;
  int64_t thread_bytes_ = 0;
  std::byte* scratch_ = nullptr;
};

bool vector_dims(const AttendParams& params) {
  const int64_t dim = params.q.shape[2];
  return dim % kTileDims == 0 && dim <= kMaxVectorHeadDim;
}

// ---- candidates

#if defined(__x86_64__)
void attend_avx512bf16(const AttendParams& params, const OpContext& context) {
  attend_with(attend_avx512bf16_kernels(), params, context);
}
void attend_avx512(const AttendParams& params, const OpContext& context) {
  attend_with(attend_avx512_kernels(), params, context);
}
void attend_avx2(const AttendParams& params, const OpContext& context) {
  attend_with(attend_avx2_kernels(), params, context);
}
#endif

}  // namespace

void attend_with(const AttendKernels& kernels, const AttendParams& params,
                 const OpContext& context) {
  if (!vector_dims(params)) {
    attend_reference(params, context);
    return;
  }
  const AttendKernel* kernel =
      kernels.bf16 != nullptr && all_bf16(params) ? kernels.bf16 : kernels.wide;
  Attend(*kernel, params, context).run();
}

std::span<const Candidate> attend_candidates() {
  static constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"attend", "avx512bf16", why_not_avx512bf16, [](Ops& ops) { ops.attend = attend_avx512bf16; }},
    {"attend", "avx512", why_not_avx512, [](Ops& ops) { ops.attend = attend_avx512; }},
    {"attend", "avx2", why_not_avx2, [](Ops& ops) { ops.attend = attend_avx2; }},
#endif
    {"attend", "reference", runs_anywhere, [](Ops& ops) { ops.attend = attend_reference; }},
  };
  static const std::vector<Candidate> list = best_first(kCandidates, cpu_maker());
  return list;
}

int64_t attend_scratch_bytes(const ScratchLimits& limits) {
  const int64_t threads = std::max(1, limits.num_threads);
  // Widest elements, most groups of the narrowest passes; see Attend::run and run_spread.
  const Layout layout{std::max(limits.head_dim, 1), 4};
  const int64_t per_thread = layout.thread_bytes(kMaxItemGroups) + Arena::kAlignment;
  const int64_t states = 2 * kPartialsPerThread * threads;
  const int64_t spread =
      states * (2 * layout.o_bytes() + static_cast<int64_t>(sizeof(PartialState)) +
                static_cast<int64_t>(sizeof(AttendGroup))) +
      4 * Arena::kAlignment;
  const int64_t reference = int64_t{kMaxBlockRows + 3} * layout.dim * 4 * threads;
  return std::max(per_thread * threads + spread, reference + Arena::kAlignment);
}

}  // namespace dsv4::cpu
