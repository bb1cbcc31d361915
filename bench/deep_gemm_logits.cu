#include <deep_gemm/impls/sm90_fp8_mqa_logits.cuh>
#include <deep_gemm/impls/sm90_fp8_paged_mqa_logits.cuh>

#include "bench/deep_gemm.h"
#include "bench/deep_gemm_launch.cuh"

namespace dsv4::deep_gemm {
namespace {

constexpr int kHeads = 64, kDim = 128, kPageRows = 64, kSplit = 256, kStages = 3;
constexpr int kLoadThreads = 128, kMathThreads = 512, kGroups = kMathThreads / 128;

constexpr int align_to(int value, int unit) {
  return (value + unit - 1) / unit * unit;
}

// Tokens come in pairs, or alone.
template <int kTokens>
void score_pages(const PagedLogits& call, cudaStream_t stream) {
  constexpr int kUnit = kDim * 8;  // of the swizzle
  constexpr int kQBytes = kTokens * kHeads * kDim;
  constexpr int kQPipe =
      kStages * (kQBytes + align_to(kTokens * kHeads * 4, kUnit)) + align_to(kStages * 16, kUnit);
  constexpr int kKPipe =
      kStages * (kPageRows * kDim + align_to(kPageRows * 4, kUnit)) + align_to(kStages * 16, kUnit);
  constexpr int kSmemBytes = kQPipe + kGroups * kKPipe + kGroups * 16 + 4;
  const auto rows = static_cast<uint64_t>(call.batch) * kTokens;
  const auto pages = static_cast<uint64_t>(call.num_pages);
  const auto stride = static_cast<uint64_t>(call.page_stride_bytes);
  const CUtensorMap q = tensor_map(call.q, CU_TENSOR_MAP_DATA_TYPE_UINT8, kDim,
                                   {kDim, rows * kHeads}, {kDim}, {kDim, kTokens * kHeads});
  const CUtensorMap k = tensor_map(call.pages, CU_TENSOR_MAP_DATA_TYPE_UINT8, kDim,
                                   {kDim, kPageRows, pages}, {kDim, stride}, {kDim, kPageRows, 1});
  const CUtensorMap scale =
      tensor_map(static_cast<const char*>(call.pages) + kPageRows * kDim,
                 CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 0, {kPageRows, pages}, {stride}, {kPageRows, 1});
  const CUtensorMap weights = tensor_map(call.weights, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 0,
                                         {kHeads, rows}, {kHeads * 4}, {kHeads, kTokens});
  const auto kernel = &::deep_gemm::sm90_fp8_paged_mqa_logits<kTokens, kHeads, kDim, kPageRows,
                                                              true, false, kStages, kStages, kSplit,
                                                              kLoadThreads, kMathThreads, float>;
  const auto words = [](const int32_t* data) { return reinterpret_cast<const uint32_t*>(data); };
  launch(kernel, kMultiprocessors, kLoadThreads + kMathThreads, kSmemBytes, 1, stream,
         static_cast<uint32_t>(call.batch), static_cast<uint32_t>(call.entries),
         static_cast<uint32_t>(call.entries / kPageRows), words(call.lengths), call.logits,
         words(call.block_table), static_cast<const uint32_t*>(nullptr), words(call.schedule), q, k,
         scale, weights);
}

}  // namespace

void schedule(const PagedLogits& call, cudaStream_t stream) {
  const auto kernel = &::deep_gemm::sched::sm90_paged_mqa_logits_metadata<kMaxBatch, kSplit,
                                                                          kMultiprocessors, false>;
  launch(kernel, 1, 32, kMaxBatch * 4, 1, stream, static_cast<uint32_t>(call.batch),
         static_cast<uint32_t>(call.tokens_per_seq), true,
         reinterpret_cast<const uint32_t*>(call.lengths), static_cast<const uint32_t*>(nullptr),
         reinterpret_cast<uint32_t*>(call.schedule));
}

void score(const PagedLogits& call, cudaStream_t stream) {
  if (call.tokens_per_seq == 1) {
    score_pages<1>(call, stream);
  } else {
    score_pages<2>(call, stream);
  }
}

void score(const Logits& call, cudaStream_t stream) {
  constexpr int kTokens = 128 / kHeads, kKeys = 256;
  constexpr int kSmemBytes = kStages * (kTokens * kHeads * (kDim + 4) + kKeys * (kDim + 4)) +
                             (kStages * 4 + kGroups * 2) * 8 + 4;
  const auto tokens = static_cast<uint64_t>(call.tokens), keys = static_cast<uint64_t>(call.keys);
  const CUtensorMap q = tensor_map(call.q, CU_TENSOR_MAP_DATA_TYPE_UINT8, kDim,
                                   {kDim, tokens * kHeads}, {kDim}, {kDim, kTokens * kHeads});
  const CUtensorMap k =
      tensor_map(call.k, CU_TENSOR_MAP_DATA_TYPE_UINT8, kDim, {kDim, keys}, {kDim}, {kDim, kKeys});
  const CUtensorMap scale = tensor_map(call.k_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 0,
                                       {(keys + 3) / 4 * 4, 1}, {keys * 4}, {kKeys, 1});
  const CUtensorMap weights = tensor_map(call.weights, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 0,
                                         {kHeads, tokens}, {kHeads * 4}, {kHeads, kTokens});
  const auto kernel =
      &::deep_gemm::sm90_fp8_mqa_logits<kHeads, kDim, false, kTokens, kKeys, kStages, kStages,
                                        kMultiprocessors, kLoadThreads, kMathThreads, float>;
  const auto words = [](const int32_t* data) {
    return reinterpret_cast<uint32_t*>(const_cast<int32_t*>(data));
  };
  launch(kernel, kMultiprocessors, kLoadThreads + kMathThreads, kSmemBytes, 1, stream,
         static_cast<uint32_t>(call.tokens), static_cast<uint32_t>(call.keys), uint32_t{0},
         static_cast<uint32_t>(logits_stride(call.keys)), words(call.begin), words(call.end),
         call.logits, q, k, scale, weights);
}

}  // namespace dsv4::deep_gemm
