// Driver of the indexer scores: cuts a tile into items and runs the candidate's kernels over blocks
// of keys. See index_logits.h.
#include "backends/cpu/ops/index_logits.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/attend_arith.h"
#include "backends/cpu/ops/index_bounds.h"
#include "backends/cpu/parallel.h"
#include "cache/kv_format.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

constexpr int kItemTokens = 8;
// Keys of an item at most, and of one of the last items of a call.
constexpr int64_t kItemKeys = 4096;
constexpr int64_t kLastItemKeys = 512;

struct Layout {
  int64_t heads, dim, elem_bytes;
  int64_t padded() const { return round_up(heads, kIndexLanes); }
  int64_t q_bytes() const { return padded() * dim * elem_bytes; }
  int64_t weight_bytes() const { return padded() * 4; }
  int64_t keys_bytes() const { return kKeyBlock * dim * elem_bytes; }
  int64_t lanes_bytes() const { return kKeyBlock * kIndexLanes * 4; }
  int64_t thread_bytes() const {
    return kItemTokens * (q_bytes() + weight_bytes()) + keys_bytes() + lanes_bytes();
  }
};

// Where a run of tokens cuts its keys into items: large ones, and small ones at the end of a call's
// only run, so that threads end together.
class Cuts {
 public:
  Cuts(int64_t keys, int64_t runs, int threads) : keys_(keys) {
    const int64_t wanted = ceil_div(8 * threads, runs);
    large_ = std::clamp(round_up(ceil_div(keys, wanted), kKeyBlock), int64_t{kKeyBlock}, kItemKeys);
    small_ = runs == 1 ? std::min(large_, kLastItemKeys) : large_;
    const int64_t tail = runs == 1 ? large_ * threads : 0;  // cut small
    num_large_ = std::max<int64_t>(0, keys - tail) / large_;
    count_ = num_large_ + ceil_div(keys - num_large_ * large_, small_);
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t cut) const {
    return std::min(keys_, std::min(cut, num_large_) * large_ +
                               std::max<int64_t>(0, cut - num_large_) * small_);
  }

 private:
  int64_t keys_, large_ = 0, small_ = 0, num_large_ = 0, count_ = 0;
};

class IndexLogits {
 public:
  IndexLogits(const IndexKernel& kernel, const IndexLogitsParams& params, const OpContext& context)
      : kernel_(kernel),
        params_(params),
        context_(context),
        threads_(num_threads(context.stream)),
        layout_{params.q.shape[1], params.q.shape[2], kernel.elem_bytes} {}

  void run() {
    Arena& arena = *context_.scratch;
    Arena::Scope scope(arena);
    const int64_t tokens = params_.q.shape[0];
    scratch_ = arena.take(layout_.thread_bytes() * threads_);
    auto* starts = arena.take_array<int32_t>(tokens + 1);
    packed_run_ = arena.take_array<int64_t>(threads_);
    if (arena.measuring()) return;
    std::fill_n(packed_run_, threads_, int64_t{-1});

    // Runs of tokens of one sequence share converted keys.
    int64_t runs = 0, longest = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t == 0 || params_.token_to_seq[t] != params_.token_to_seq[t - 1] ||
          t - starts[runs - 1] == kItemTokens) {
        starts[runs++] = static_cast<int32_t>(t);
      }
      longest = std::max<int64_t>(longest, params_.end[t]);
    }
    starts[runs] = static_cast<int32_t>(tokens);
    if (longest == 0) return;

    const Cuts cuts(longest, runs, threads_);
    parallel_chunks(context_.stream, runs * cuts.count(), 1,
                    [&](int64_t item, int64_t, int thread_idx) {
                      const int64_t run = item / cuts.count(), cut = item % cuts.count();
                      run_item(run, starts[run], starts[run + 1], cuts.begin(cut),
                               cuts.begin(cut + 1), threads_ == 1 ? 0 : thread_idx);
                    });
  }

 private:
  void run_item(int64_t run, int64_t first, int64_t last, int64_t begin, int64_t end,
                int thread_idx) const {
    FlushSubnormals flush_subnormals;
    std::byte* rest = scratch_ + layout_.thread_bytes() * thread_idx;
    const int heads = static_cast<int>(layout_.heads), dim = static_cast<int>(layout_.dim);
    const auto carve = [&](int64_t bytes) { return std::exchange(rest, rest + bytes); };
    int64_t longest = 0;
    for (int64_t t = first; t < last; ++t) longest = std::max<int64_t>(longest, params_.end[t]);
    end = std::min(end, longest);
    if (begin >= end) return;

    std::byte* packed = carve(kItemTokens * layout_.q_bytes());
    auto* weights = reinterpret_cast<float*>(carve(kItemTokens * layout_.weight_bytes()));
    std::byte* keys = carve(layout_.keys_bytes());
    auto* lanes = reinterpret_cast<float*>(carve(layout_.lanes_bytes()));
    // A thread's items of one run follow each other: queries stay packed.
    const bool is_packed = std::exchange(packed_run_[thread_idx], run) == run;
    for (int64_t t = first; t < last && !is_packed; ++t) {
      const auto* q = static_cast<const char*>(params_.q.data) +
                      t * params_.q.strides[0] * size_of(params_.q.dtype);
      kernel_.pack_q(q, params_.q.dtype, params_.q.strides[1], heads, dim,
                     packed + (t - first) * layout_.q_bytes());
      float* w = weights + (t - first) * layout_.padded();
      std::fill_n(w, layout_.padded(), 0.0f);
      std::copy_n(params_.weights.as<float>() + t * params_.weights.strides[0], heads, w);
    }

    const int64_t seq = params_.token_to_seq[first];
    KeyRows buffers[2];
    resolve_keys(params_, seq, begin, end, buffers[0]);
    for (int64_t j = begin, at = 0; j < end; j += kKeyBlock, at ^= 1) {
      const KeyRows& block = buffers[at];
      KeyRows& next = buffers[at ^ 1];
      resolve_keys(params_, seq, j + kKeyBlock, end, next);
      kernel_.load_keys(block, params_.cache.format, dim, keys);
      const KeyRows* fetch = &next;  // once, beside the first token's scores
      for (int64_t t = first; t < last; ++t) {
        const int visible =
            static_cast<int>(std::clamp<int64_t>(params_.end[t] - j, 0, block.count));
        if (visible == 0) continue;
        alignas(64) float sums[kKeyBlock];
        kernel_.score(packed + (t - first) * layout_.q_bytes(),
                      weights + (t - first) * layout_.padded(), keys, visible, heads, dim, lanes,
                      sums, std::exchange(fetch, nullptr));
        write(block, visible, sums, params_.logits.as<float>() + t * params_.logits.strides[0] + j);
      }
    }
  }

  void write(const KeyRows& keys, int count, const float* sums, float* logits) const {
    if (params_.cache.format != KvFormat::kIndexFp8) {
      std::copy_n(sums, count, logits);
      return;
    }
    scale_sums(keys, count, sums, logits);
  }

  const IndexKernel& kernel_;
  const IndexLogitsParams& params_;
  const OpContext& context_;
  int threads_;
  Layout layout_;
  std::byte* scratch_ = nullptr;
  int64_t* packed_run_ = nullptr;  // [threads], whose queries lie packed in a thread's scratch
};

// ---- candidates

#if defined(__x86_64__)
void index_logits_avx512bf16(const IndexLogitsParams& params, const OpContext& context) {
  index_logits_with(index_avx512bf16_kernels(), params, context);
}
void index_logits_avx512vnni(const IndexLogitsParams& params, const OpContext& context) {
  index_logits_with(index_avx512vnni_kernels(), params, context);
}
void index_logits_avx512(const IndexLogitsParams& params, const OpContext& context) {
  index_logits_with(index_avx512_kernels(), params, context);
}
void index_logits_avx2(const IndexLogitsParams& params, const OpContext& context) {
  index_logits_with(index_avx2_kernels(), params, context);
}
#endif

}  // namespace

void resolve_keys(const IndexLogitsParams& params, int64_t seq, int64_t first, int64_t end,
                  KeyRows& keys) {
  const CacheView& cache = params.cache;
  const RowLayout layout = row_layout(cache.format, cache.row_elems);
  const int32_t* table = params.blocks.table + seq * params.blocks.stride;
  keys.count = static_cast<int>(std::clamp<int64_t>(end - first, 0, kKeyBlock));
  keys.value_bytes = static_cast<int>(layout.value_bytes);
  int64_t logical = first / cache.rows_per_block, offset = first - logical * cache.rows_per_block;
  for (int i = 0; i < keys.count; ++logical, offset = 0) {
    std::byte* page = block_pointer(cache, table[logical % params.blocks.columns]);
    RowAddress row = row_in_page(page, cache.rows_per_block, offset, layout);
    const auto in_page = static_cast<int>(cache.rows_per_block - offset);
    for (const int last = std::min(keys.count, i + in_page); i < last; ++i) {
      keys.rows[i] = {row.values, row.scales};
      row.values += layout.value_bytes;
      row.scales += layout.scale_bytes;
    }
  }
}

void scale_sums(const KeyRows& keys, int count, const float* sums, float* logits) {
  for (int i = 0; i < count; ++i) {
    float scale;
    std::memcpy(&scale, keys.rows[i].scales, sizeof(scale));
    logits[i] = sums[i] * scale;
  }
}

RowRef index_row(const IndexLogitsParams& params, int64_t seq, int64_t entry) {
  const int64_t rows = params.cache.rows_per_block, logical = entry / rows;
  const int32_t block =
      params.blocks.table[seq * params.blocks.stride + logical % params.blocks.columns];
  const RowAddress row = row_address(params.cache, block * rows + entry % rows);
  return {row.values, row.scales};
}

void index_logits_with(const IndexKernels& kernels, const IndexLogitsParams& params,
                       const OpContext& context) {
  if (can_bound(kernels, params)) {
    best_index_logits(kernels, params, context);
  } else {
    all_index_logits(kernels, params, context);
  }
}

const IndexKernel& index_kernel(const IndexKernels& kernels, const IndexLogitsParams& params) {
  if (params.q.dtype == DType::kBf16) {
    const KvFormat format = params.cache.format;
    if (format == KvFormat::kIndexFp8 && kernels.bf16 != nullptr) return *kernels.bf16;
    if (format == KvFormat::kIndexMxfp4 && params.q.shape[2] == kIndexTileDims)
      return *kernels.mxfp4;
  }
  return *kernels.wide;
}

void all_index_logits(const IndexKernels& kernels, const IndexLogitsParams& params,
                      const OpContext& context) {
  if (params.q.shape[2] % kIndexTileDims != 0) {
    index_logits_reference(params, context);
    return;
  }
  IndexLogits(index_kernel(kernels, params), params, context).run();
}

std::span<const Candidate> index_logits_candidates() {
  static constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"index_logits", "avx512bf16", why_not_avx512bf16,
     [](Ops& ops) { ops.index_logits = index_logits_avx512bf16; }},
    {"index_logits", "avx512vnni", why_not_avx512vnni,
     [](Ops& ops) { ops.index_logits = index_logits_avx512vnni; }},
    {"index_logits", "avx512", why_not_avx512,
     [](Ops& ops) { ops.index_logits = index_logits_avx512; }},
    {"index_logits", "avx2", why_not_avx2, [](Ops& ops) { ops.index_logits = index_logits_avx2; }},
#endif
    {"index_logits", "reference", runs_anywhere,
     [](Ops& ops) { ops.index_logits = index_logits_reference; }},
  };
  static const std::vector<Candidate> list = best_first(kCandidates, cpu_maker());
  return list;
}

int64_t index_logits_scratch_bytes(const ScratchLimits& limits) {
  const int64_t threads = std::max(1, limits.num_threads);
  const Layout layout{limits.index_heads, limits.index_dim, kMaxIndexElemBytes};
  const int64_t all = layout.thread_bytes() * threads + (limits.max_tokens + 1) * 4 + threads * 8 +
                      3 * Arena::kAlignment;
  return std::max(all, best_index_logits_scratch_bytes(limits));
}

}  // namespace dsv4::cpu
