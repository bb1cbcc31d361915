// Upper bounds of indexer scores from 8-bit products: where only the best k scores matter, most
// keys need no other.
//
// Problem   of n scores (index_logits.h) the k best; k / n is 0.2 to 3%
// Method    keys and queries as bytes, q' and k': VPDPBUSD does twice the products of VDPBF16PS.
//           A score is at most k_scale (sum_h w_h max(0, q'_h . k') + error). A sample of these
//           bounds gives keys that are likely to be the best; the k-th best of their scores, which
//           are computed as always, is a threshold that every chosen score reaches. Keys whose
//           bound does not reach it keep that, the others get their score. So the bounds decide
//           what is worth computing, never what is chosen.
// Bytes     k' = 4 round(code / 4): E4M3 codes are multiples of 4 from 32 on, so that only smaller
//           ones are off, by 2 at most. q'_h: multiples of the smallest power of two that brings
//           the largest to 127.
// Error     |sum_h w_h (max(0, q_h . k) - max(0, q'_h . k'))| <= sum_h |w_h| |q_h . k - q'_h . k'|
//             <= sqrt(sum_h |w_h|) (|A| |k - k'| + |A - A'| |k'|)
//           by Cauchy and Schwarz, with A = diag(sqrt|w|) Q and its largest singular value |A|,
//             |A|^2 <= tr((A A^T)^8)^(1/8), at most heads^(1/8) times too large; 1.1 for random
//             ones
//           and the roundings of both sums, (dim + heads + 8) 2^-24 of sum_h |w_h| |q_h| |k| each.
//           Both norms of a key are sums of squares from tables, by VPDPBUSD.
// Budget    per key and token 64 x 128 products = 128 VPDPBUSD; a key's codes and norms 16
//           instructions, |A| and |A - A'| of a token 20 us
#pragma once
#include <cstdint>

#include "backends/cpu/ops/index_logits.h"

namespace dsv4::cpu {

/// A block of keys as bytes, and what bounds take from a key.
struct ByteKeys {
  uint8_t* codes;  // [kKeyBlock][dim], k' / 4 + 128
  alignas(64) float scale[kKeyBlock];
  float length[kKeyBlock];    // |k'|
  float distance[kKeyBlock];  // at least |k - k'|
};

/// A token's packed queries, and scratch memory of pack.
int64_t bound_packed_bytes(int64_t heads, int64_t dim);
int64_t bound_scratch_bytes(int64_t heads, int64_t dim);

struct IndexBoundKernel {
  /// q [heads, dim] bf16, rows `stride` elements apart, weights [heads] -> `packed`. Returns false
  /// where bounds would not be finite numbers.
  bool (*pack)(const void* q, int64_t stride, const float* weights, int heads, int dim,
               std::byte* packed, std::byte* scratch);
  void (*load_keys)(const KeyRows& keys, int dim, ByteKeys& out);
  /// upper[j] of `count` loaded keys. lanes and next: as in IndexKernel::score.
  void (*bound)(const std::byte* packed, const ByteKeys& keys, int count, int heads, int dim,
                float* lanes, float* upper, const KeyRows* next);
};
const IndexBoundKernel& index_bound_avx512vbmi();

/// So that sums of codes are exact in f32.
constexpr int kMaxBoundDims = 512;

/// Can the scores of these params be left out where they do not matter?
bool can_bound(const IndexKernels& kernels, const IndexLogitsParams& params);
/// The scores that matter, bounds for others.
void best_index_logits(const IndexKernels& kernels, const IndexLogitsParams& params,
                       const OpContext& context);
int64_t best_index_logits_scratch_bytes(const ScratchLimits& limits);

}  // namespace dsv4::cpu
