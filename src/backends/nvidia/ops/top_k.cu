// top_k: one CTA for every row (top_k-inl.h, top_k_short-inl.h), and a reference that bisects the
// keys.
#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/top_k-inl.h"

namespace dsv4::nvidia {
namespace {

__global__ void __launch_bounds__(TopKTraits::kThreads)
    sm80_top_k(const __grid_constant__ TopKArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  auto& storage = *reinterpret_cast<TopKStorage<true>*>(shared);
  prepare_top_k(storage, SingleCta());
  follow_kernels_before();
  top_k_row(storage, args, blockIdx.x, SingleCta());
}

__global__ void __launch_bounds__(TopKTraits::kThreads)
    short_top_k(const __grid_constant__ TopKArgs args) {
  __shared__ TopKShortStorage shared;
  shared.selection.clear();
  follow_kernels_before();
  const int64_t token = blockIdx.x;
  const int32_t n = min(max(args.end[token], 0), args.width);
  TopKShort scores;
  scores.load(args.logits + token * args.logits_stride, args.width);
  top_k_short_row(shared.selection, shared.range, args, token, n, scores);
}

// ---- reference: a CTA finds the k-th key bit by bit, counting the row 32 times, then writes what
// is above it, and the first ties, chunk by chunk.

constexpr int kReferenceThreads = 256;

__global__ void __launch_bounds__(kReferenceThreads)
    reference_top_k(const __grid_constant__ TopKArgs args) {
  const int64_t token = blockIdx.x;
  const int32_t n = min(max(args.end[token], 0), args.width), k = args.k;
  const float* scores = args.logits + token * args.logits_stride;
  int32_t* indices = args.indices + token * args.indices_stride;
  if (threadIdx.x == 0) args.length[token] = min(n, k);
  if (n <= k) {
    for (int32_t i = threadIdx.x; i < k; i += kReferenceThreads) indices[i] = i < n ? i : -1;
    return;
  }
  __shared__ int32_t counter;
  // Scores whose key is at least `least`.
  const auto count_from = [&](uint32_t least) {
    __syncthreads();
    if (threadIdx.x == 0) counter = 0;
    __syncthreads();
    int32_t own = 0;
    for (int32_t i = threadIdx.x; i < n; i += kReferenceThreads)
      own += order_key(scores[i]) >= least;
    atomicAdd(&counter, own);
    __syncthreads();
    return counter;
  };
  uint32_t threshold = 0;  // the largest key that at least k scores reach
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = threshold | 1u << bit;
    if (count_from(higher) >= k) threshold = higher;
  }
  int32_t ties = k - (threshold == ~0u ? 0 : count_from(threshold + 1)), emitted = 0;
  __shared__ uint32_t keys[kReferenceThreads];
  for (int32_t base = 0; base < n; base += kReferenceThreads) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    __syncthreads();
    keys[threadIdx.x] = i < n ? order_key(scores[i]) : 0;
    __syncthreads();
    // Every thread walks the chunk: what is taken before its own score, and by all.
    for (int32_t j = 0; j < kReferenceThreads; ++j) {
      const bool tie = keys[j] == threshold && ties > 0;
      if (!tie && keys[j] <= threshold) continue;
      if (j == static_cast<int32_t>(threadIdx.x)) indices[emitted] = i;
      ties -= tie;
      ++emitted;
    }
  }
}

}  // namespace

void top_k_short(const TopKParams& params, const OpContext& context) {
  launch<short_top_k>({dim3(static_cast<unsigned>(params.logits.shape[0])), TopKTraits::kThreads},
                      stream_of(context.stream), top_k_args(params));
}

void top_k_sm80(const TopKParams& params, const OpContext& context) {
  const int64_t tokens = params.logits.shape[0];
  if (context.scratch->measuring() || tokens == 0 || params.topk_indices.shape[1] == 0) return;
  if (params.logits.shape[1] <= TopKTraits::kShortRow) return top_k_short(params, context);
  launch<sm80_top_k>(
      {dim3(static_cast<unsigned>(tokens)), TopKTraits::kThreads, sizeof(TopKStorage<true>)},
      stream_of(context.stream), top_k_args(params));
}

void top_k_reference(const TopKParams& params, const OpContext& context) {
  const int64_t tokens = params.logits.shape[0];
  if (context.scratch->measuring() || tokens == 0 || params.topk_indices.shape[1] == 0) return;
  reference_top_k<<<static_cast<unsigned>(tokens), kReferenceThreads, 0,
                    stream_of(context.stream)>>>(top_k_args(params));
  DSV4_CUDA_CHECK_LAUNCH();
}

std::span<const Candidate> top_k_candidates() {
  static const Candidate list[] = {
      {"top_k", "sm90", needs_sm90,
       [](Ops& ops) { ops.top_k = top_k_sm90, ops.top_k_maps_slots = true; }},
      {"top_k", "sm80", needs_sm80,
       [](Ops& ops) { ops.top_k = top_k_sm80, ops.top_k_maps_slots = true; }},
      {"top_k", "reference", needs_sm80,
       [](Ops& ops) { ops.top_k = top_k_reference, ops.top_k_maps_slots = false; }},
  };
  return list;
}

int64_t top_k_scratch_bytes(const ScratchLimits&) {
  return 0;
}

}  // namespace dsv4::nvidia
