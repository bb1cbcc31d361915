// Indexer scores where only the best of a token matter: bounds of all, scores of few. See
// index_bounds.h.
//
// Parallel  over stretches of the keys, one run of up to 8 tokens of a sequence at a time; a run
//           has at least 64 times as many keys as scores that matter
#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <utility>

#include "backends/cpu/ops/attend_arith.h"
#include "backends/cpu/ops/index_bounds.h"
#include "backends/cpu/ops/top_k.h"
#include "backends/cpu/parallel.h"

namespace dsv4::cpu {
namespace {

constexpr int kRunTokens = 8;
constexpr int64_t kCutKeys = 1024;  // of a stretch where all keys are looked at
// Below, too many bounds reach the threshold.
constexpr int64_t kMinKeysPerBest = 64;
// Keys that may be likely. More say that scores hardly differ: then all are computed.
constexpr int64_t kLikelyPerBest = 8;

struct Layout {
  int64_t heads, dim, elem_bytes, best;

  int64_t padded() const { return round_up(heads, kIndexLanes); }
  int64_t q_bytes() const { return round_up(padded() * dim * elem_bytes, 64); }
  int64_t bound_bytes() const { return round_up(bound_packed_bytes(heads, dim), 64); }
  int64_t likely() const { return kLikelyPerBest * best; }
  // For the keys of a block as either kernel wants them, or for packing a token.
  int64_t thread_bytes() const {
    const int64_t keys = kKeyBlock * dim * elem_bytes;
    return round_up(std::max(keys, bound_scratch_bytes(heads, dim)), 64) + lanes_bytes();
  }
  int64_t lanes_bytes() const { return kKeyBlock * kIndexLanes * 4; }
};

class BestIndexLogits {
 public:
  BestIndexLogits(const IndexKernels& kernels, const IndexLogitsParams& params,
                  const OpContext& context)
      : kernels_(kernels),
        params_(params),
        context_(context),
        threads_(num_threads(context.stream)),
        exact_(index_kernel(kernels, params)),
        bound_(*kernels.bound),
        heads_(static_cast<int>(params.q.shape[1])),
        dim_(static_cast<int>(params.q.shape[2])),
        layout_{heads_, dim_, exact_.elem_bytes, params.best} {}

  void run() {
    const int64_t tokens = params_.q.shape[0];
    if (context_.scratch->measuring()) {
      {
        Arena::Scope scope(*context_.scratch);
        take_scratch();
      }
      all_index_logits(kernels_, params_, context_);
      return;
    }
    for (int64_t first = 0, last; first < tokens; first = last) {
      last = first + 1;
      const bool bounded = has_many_keys(first);
      const auto joins = [&](int64_t t) {
        return t < tokens && has_many_keys(t) == bounded &&
               (!bounded ||
                (t - first < kRunTokens && params_.token_to_seq[t] == params_.token_to_seq[first]));
      };
      while (joins(last)) ++last;
      if (bounded) {
        run_bounded(first, last);
      } else {
        run_all(first, last);
      }
    }
  }

 private:
  // What the scores of one token need. Likely keys: num_likely of them, unless they are too many.
  struct Token {
    std::byte* q;
    float* weights;
    std::byte* bound;
    float* likely_scores;
    int32_t* likely_keys;
    std::atomic<int64_t>* num_likely;
    float* logits;
    int64_t end;
    bool is_bounded = false;
    float cutoff = 0, threshold = 0;
  };

  bool has_many_keys(int64_t t) const { return params_.end[t] >= kMinKeysPerBest * params_.best; }

  void run_all(int64_t first, int64_t last) const {
    IndexLogitsParams params = params_;
    params.q = params.q.rows(first, last - first);
    params.weights = params.weights.rows(first, last - first);
    params.logits = params.logits.rows(first, last - first);
    params.token_to_seq += first;
    params.end += first;
    all_index_logits(kernels_, params, context_);
  }

  void take_scratch() {
    Arena& arena = *context_.scratch;
    q_ = arena.take(layout_.q_bytes() * kRunTokens);
    weights_ = arena.take_array<float>(layout_.padded() * kRunTokens);
    bounds_ = arena.take(layout_.bound_bytes() * kRunTokens);
    likely_scores_ = arena.take_array<float>(layout_.likely() * kRunTokens);
    likely_keys_ = arena.take_array<int32_t>(layout_.likely() * kRunTokens);
    num_likely_ = arena.take_array<std::atomic<int64_t>>(kRunTokens);
    threads_scratch_ = arena.take(layout_.thread_bytes() * threads_);
  }

  void run_bounded(int64_t first, int64_t last) {
    Arena::Scope scope(*context_.scratch);
    take_scratch();
    seq_ = params_.token_to_seq[first];
    num_tokens_ = static_cast<int>(last - first);
    longest_ = 0;
    for (int i = 0; i < num_tokens_; ++i) {
      const int64_t t = first + i;
      tokens_[i] = {.q = q_ + i * layout_.q_bytes(),
                    .weights = weights_ + i * layout_.padded(),
                    .bound = bounds_ + i * layout_.bound_bytes(),
                    .likely_scores = likely_scores_ + i * layout_.likely(),
                    .likely_keys = likely_keys_ + i * layout_.likely(),
                    .num_likely = new (num_likely_ + i) std::atomic<int64_t>(0),
                    .logits = params_.logits.as<float>() + params_.logits.strides[0] * t,
                    .end = params_.end[t]};
      longest_ = std::max(longest_, tokens_[i].end);
    }
    parallel_chunks(context_.stream, num_tokens_, 1, [&](int64_t i, int64_t, int thread_idx) {
      pack(first + i, tokens_[i], thread_idx);
    });
    over_keys(kCutKeys,
              [&](int64_t begin, int64_t end, int thread_idx) { bound(begin, end, thread_idx); });
    parallel_chunks(context_.stream, num_tokens_, 1, [&](int64_t i, int64_t, int thread_idx) {
      tokens_[i].cutoff =
          sampled_cutoff(tokens_[i].logits, tokens_[i].end, params_.best, bins(thread_idx));
    });
    // Few keys of a stretch are looked at: the longer it is, the fuller are their blocks.
    const int64_t stretch = round_up(ceil_div(longest_, 4 * threads_), kKeyBlock);
    over_keys(stretch, [&](int64_t begin, int64_t end, int thread_idx) {
      for (int i = 0; i < num_tokens_; ++i) score_likely(tokens_[i], begin, end, thread_idx);
    });
    parallel_chunks(context_.stream, num_tokens_, 1,
                    [&](int64_t i, int64_t, int idx) { choose_threshold(tokens_[i], bins(idx)); });
    over_keys(stretch, [&](int64_t begin, int64_t end, int thread_idx) {
      for (int i = 0; i < num_tokens_; ++i) score_possible(tokens_[i], begin, end, thread_idx);
    });
  }

  template <typename F>
  void over_keys(int64_t stretch, F&& f) const {
    parallel_chunks(context_.stream, longest_, stretch, [&](int64_t begin, int64_t end, int idx) {
      FlushSubnormals flush_subnormals;
      f(begin, end, idx);
    });
  }

  std::byte* thread_scratch(int thread_idx) const {
    return threads_scratch_ + layout_.thread_bytes() * (threads_ == 1 ? 0 : thread_idx);
  }
  float* lanes(int thread_idx) const {
    return reinterpret_cast<float*>(thread_scratch(thread_idx) + layout_.thread_bytes() -
                                    layout_.lanes_bytes());
  }

  uint32_t* bins(int thread_idx) const {
    static_assert(kCutoffBins * 4 <= kKeyBlock * kIndexTileDims * 2);
    return reinterpret_cast<uint32_t*>(thread_scratch(thread_idx));
  }

  void pack(int64_t t, Token& token, int thread_idx) const {
    FlushSubnormals flush_subnormals;
    const auto* q = params_.q.as<uint16_t>() + t * params_.q.strides[0];
    const float* weights = params_.weights.as<float>() + t * params_.weights.strides[0];
    exact_.pack_q(q, DType::kBf16, params_.q.strides[1], heads_, dim_, token.q);
    std::fill_n(token.weights, layout_.padded(), 0.0f);
    std::copy_n(weights, heads_, token.weights);
    token.is_bounded = bound_.pack(q, params_.q.strides[1], weights, heads_, dim_, token.bound,
                                   thread_scratch(thread_idx));
  }

  // Bounds of keys [begin, end) to the place of their scores.
  void bound(int64_t begin, int64_t end, int thread_idx) const {
    ByteKeys keys;
    keys.codes = reinterpret_cast<uint8_t*>(thread_scratch(thread_idx));
    KeyRows buffers[2];
    resolve_keys(params_, seq_, begin, end, buffers[0]);
    for (int64_t j = begin, at = 0; j < end; j += kKeyBlock, at ^= 1) {
      const KeyRows& block = buffers[at];
      KeyRows& next = buffers[at ^ 1];
      resolve_keys(params_, seq_, j + kKeyBlock, end, next);
      bound_.load_keys(block, dim_, keys);
      const KeyRows* fetch = &next;  // once, beside the first token's bounds
      for (int i = 0; i < num_tokens_; ++i) {
        const Token& token = tokens_[i];
        const auto visible = static_cast<int>(std::clamp<int64_t>(token.end - j, 0, block.count));
        if (token.is_bounded) {
          bound_.bound(token.bound, keys, visible, heads_, dim_, lanes(thread_idx),
                       token.logits + j, std::exchange(fetch, nullptr));
        } else {
          std::fill_n(token.logits + j, visible, std::numeric_limits<float>::infinity());
        }
      }
    }
  }

  bool has_too_many_likely(const Token& token) const {
    return token.num_likely->load(std::memory_order_relaxed) > layout_.likely();
  }

  // Scores of the keys [begin, end) whose bound reaches the cutoff, aside.
  void score_likely(const Token& token, int64_t begin, int64_t end, int thread_idx) const {
    if (has_too_many_likely(token)) return;
    score_where(
        token, begin, end, thread_idx, [&](float upper) { return upper >= token.cutoff; },
        [&](const float* scores, const int32_t* keys, int count) {
          const int64_t place = token.num_likely->fetch_add(count, std::memory_order_relaxed);
          if (place + count > layout_.likely()) return false;
          std::copy_n(scores, count, token.likely_scores + place);
          std::copy_n(keys, count, token.likely_keys + place);
          return true;
        });
  }

  void choose_threshold(Token& token, uint32_t* bins) const {
    if (has_too_many_likely(token)) return;
    token.threshold = cutoff_of(token.likely_scores, *token.num_likely, 1, params_.best, bins);
  }

  // Scores of all keys [begin, end) whose bound reaches the threshold; others keep their bound.
  void score_possible(const Token& token, int64_t begin, int64_t end, int thread_idx) const {
    const auto write = [&](const float* scores, const int32_t* keys, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        if (begin <= keys[i] && keys[i] < end) token.logits[keys[i]] = scores[i];
      }
      return true;
    };
    if (has_too_many_likely(token)) {
      score_where(
          token, begin, end, thread_idx, [](float) { return true; }, write);
      return;
    }
    if (token.threshold < token.cutoff) {
      score_where(
          token, begin, end, thread_idx,
          [&](float upper) { return upper >= token.threshold && upper < token.cutoff; }, write);
    }
    write(token.likely_scores, token.likely_keys, *token.num_likely);
  }

  // Scores of the keys in [begin, end) whose bound `wanted` accepts, to `take`, until it says no.
  template <typename Wanted, typename Take>
  void score_where(const Token& token, int64_t begin, int64_t end, int thread_idx, Wanted&& wanted,
                   Take&& take) const {
    struct Keys {
      KeyRows rows;
      int32_t entries[kKeyBlock];
    };
    Keys buffers[2];
    int at = 0;
    bool goes_on = true;
    const auto score = [&](const Keys& keys) {
      if (keys.rows.count == 0 || !goes_on) return;
      std::byte* loaded = thread_scratch(thread_idx);
      exact_.load_keys(keys.rows, params_.cache.format, dim_, loaded);
      alignas(64) float sums[kKeyBlock];
      exact_.score(token.q, token.weights, loaded, keys.rows.count, heads_, dim_, lanes(thread_idx),
                   sums, nullptr);
      scale_sums(keys.rows, keys.rows.count, sums, sums);
      goes_on = take(sums, keys.entries, keys.rows.count);
    };
    const auto add = [&](int64_t entry) {
      Keys& keys = buffers[at];
      keys.entries[keys.rows.count] = static_cast<int32_t>(entry);
      const RowRef row = index_row(params_, seq_, entry);
      for (int b = 0; b < dim_; b += 64) __builtin_prefetch(row.values + b);
      __builtin_prefetch(row.scales);
      keys.rows.rows[keys.rows.count++] = row;
      if (keys.rows.count < kKeyBlock) return;
      // A block stays behind: it is on its way beside the scores of the one before it.
      at ^= 1;
      score(buffers[at]);
      buffers[at].rows.count = 0;
    };
    end = std::min(end, token.end);
    constexpr int64_t kStep = 16;
    int64_t j = begin;
    for (; j + kStep <= end && goes_on; j += kStep) {
      // Few steps hold one; the test over 16 is vector code.
      int any = 0;
      for (int64_t i = 0; i < kStep; ++i) any |= static_cast<int>(wanted(token.logits[j + i]));
      for (int64_t i = 0; any != 0 && i < kStep; ++i) {
        if (wanted(token.logits[j + i])) add(j + i);
      }
    }
    for (; j < end; ++j) {
      if (wanted(token.logits[j])) add(j);
    }
    score(buffers[at ^ 1]);
    score(buffers[at]);
  }

  const IndexKernels& kernels_;
  const IndexLogitsParams& params_;
  const OpContext& context_;
  int threads_;
  const IndexKernel& exact_;
  const IndexBoundKernel& bound_;
  int heads_, dim_;
  Layout layout_;

  std::byte *q_ = nullptr, *bounds_ = nullptr, *threads_scratch_ = nullptr;
  float *weights_ = nullptr, *likely_scores_ = nullptr;
  int32_t* likely_keys_ = nullptr;
  std::atomic<int64_t>* num_likely_ = nullptr;
  // The run in progress.
  Token tokens_[kRunTokens];
  int num_tokens_ = 0;
  int64_t seq_ = 0, longest_ = 0;
};

}  // namespace

int64_t bound_packed_bytes(int64_t heads, int64_t dim) {
  return round_up(heads, kIndexLanes) * (dim + 8) + 3 * 4;
}

int64_t bound_scratch_bytes(int64_t heads, int64_t dim) {
  // Two matrices [dim][heads], two squares [heads][heads].
  const int64_t n = round_up(heads, kIndexLanes);
  return 2 * n * (dim + n) * 4;
}

bool can_bound(const IndexKernels& kernels, const IndexLogitsParams& params) {
  const int64_t dim = params.q.shape[2];
  return kernels.bound != nullptr && params.best > 0 && params.q.dtype == DType::kBf16 &&
         params.cache.format == KvFormat::kIndexFp8 && dim % kIndexTileDims == 0 &&
         dim <= kMaxBoundDims;
}

void best_index_logits(const IndexKernels& kernels, const IndexLogitsParams& params,
                       const OpContext& context) {
  BestIndexLogits(kernels, params, context).run();
}

int64_t best_index_logits_scratch_bytes(const ScratchLimits& limits) {
  constexpr int64_t kWideBytes = 4;
  const Layout layout{limits.index_heads, limits.index_dim, kWideBytes, limits.index_topk};
  const int64_t token = layout.q_bytes() + layout.padded() * 4 + layout.bound_bytes() +
                        layout.likely() * 8 + int64_t{sizeof(std::atomic<int64_t>)};
  return token * kRunTokens + layout.thread_bytes() * std::max(1, limits.num_threads) +
         7 * Arena::kAlignment;
}

}  // namespace dsv4::cpu
