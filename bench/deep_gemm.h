// DeepGEMM's sm_90 kernels without torch and without its compiler at run time: the kernels of its
// headers (a checkout, DSV4_DEEP_GEMM_SOURCE), instantiated with what its heuristics choose for 132
// multiprocessors and launched as its own code launches them. For cuda_pair_gemm_bench alone.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4::deep_gemm {

/// out[t, g, :] = x[t, g, :] w[g]^T with E4M3 operands, scales of 128 columns (x) and of 128 x 128
/// (w).
struct Product {
  int groups;  ///< 8 or 16: the grouped product of wo_a; 1: a projection
  int tokens;
  int rows, cols;        ///< of a group's w
  const void* x;         ///< [tokens, groups, cols]
  const float* x_scale;  ///< [groups, cols / 128, x_scale_tokens(tokens)]
  const void* w;         ///< [groups, rows, cols]
  const float* w_scale;  ///< [groups, rows / 128, cols / 128]
  void* out;             ///< [tokens, groups, rows] bf16
};
constexpr int x_scale_tokens(int tokens) {
  return (tokens + 3) / 4 * 4;
}
/// False where no kernel was instantiated for the shape.
bool multiply(const Product& call, cudaStream_t stream);

/// Scores of 64 heads of 128: logits[t, j] = k_scale_j sum_h w[t, h] max(0, q[t, h] . k_j).
struct PagedLogits {
  int batch, tokens_per_seq;  ///< tokens_per_seq 1 or 2
  int entries;                ///< a multiple of 256
  const void* q;              ///< [batch, tokens_per_seq, 64, 128] E4M3
  const float* weights;       ///< [batch, tokens_per_seq, 64]
  const void* pages;          ///< 64 rows of 128 E4M3, then 64 f32 scales
  int num_pages;
  int64_t page_stride_bytes;
  const int32_t* block_table;  ///< [batch, entries / 64]
  const int32_t* lengths;      ///< [batch, tokens_per_seq]
  float* logits;               ///< [batch, tokens_per_seq, entries]
  int32_t* schedule;           ///< kScheduleBytes
};
constexpr int64_t kScheduleBytes = 2 * 4 * 133;
constexpr int kMaxBatch = 128;
/// Deals the entries to multiprocessors; once per step there.
void schedule(const PagedLogits& call, cudaStream_t stream);
void score(const PagedLogits& call, cudaStream_t stream);

/// Every token against every key.
struct Logits {
  int tokens, keys;
  const void* q;               ///< [tokens, 64, 128] E4M3
  const float* weights;        ///< [tokens, 64]
  const void* k;               ///< [keys, 128] E4M3
  const float* k_scale;        ///< [keys]
  const int32_t *begin, *end;  ///< [tokens]: zero, keys
  float* logits;               ///< [tokens, logits_stride(keys)]
};
constexpr int64_t logits_stride(int keys) {
  return (int64_t{keys} + 256 + 255) / 256 * 256;
}
void score(const Logits& call, cudaStream_t stream);

}  // namespace dsv4::deep_gemm
