// One attention layer in float64, for one sequence from position 0 (attention.md 2, 10).
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "tests/oracle/layer_parts.h"

namespace oracle {

enum class CacheRounding { kNone, kBf16, kFp8DsMla, kFp8 };
enum class IndexRounding { kNone, kFp8, kMxfp4 };
enum class OutputRounding { kNone, kBf16, kFp8 };

/// Where values are rounded; the columns of the divergence table (attention.md 9, compressor.md
/// 2.4). Not represented: rounding of P, which depends on the running maximum of an implementation
/// and belongs to its tolerance.
struct Roundings {
  bool bf16_activations = false;
  bool quantise_linear_input = false;
  CacheRounding cache = CacheRounding::kNone;
  IndexRounding index = IndexRounding::kNone;
  bool index_hadamard = false;
  OutputRounding output = OutputRounding::kNone;
  /// Products of FP8 weights and quantised input as FP8 tensor cores sum them (fp8_sums.h).
  bool fp8_products = false;
};
inline constexpr Roundings kExact{};
inline constexpr Roundings kServing{
    true, true, CacheRounding::kFp8DsMla, IndexRounding::kFp8, false, OutputRounding::kFp8};
inline constexpr Roundings kReference{
    true, true, CacheRounding::kFp8DsMla, IndexRounding::kMxfp4, true, OutputRounding::kBf16};

struct AttentionShape {
  int num_heads = 0, head_dim = 512, rope_dim = 64, groups = 1;
  int window = 128;
  int ratio = 0;  ///< 0: no compressed rows; overlap and indexer exist for ratio 4 (attention.md 1)
  int index_heads = 0, index_dim = 128, index_topk = 0;
  double eps = 1e-6;
  std::vector<float> frequencies;
  bool overlap() const { return ratio == 4; }
  bool indexer() const { return ratio == 4; }
};

struct CompressorWeights {
  Weight wkv, wgate, ape, norm;
};
struct IndexerWeights {
  Weight wq_b, weights_proj;
  CompressorWeights compressor;
};
struct AttentionWeights {
  Weight wq_a, q_norm, wq_b, wkv, kv_norm, attn_sink, wo_a, wo_b;
  CompressorWeights compressor;  ///< ratio > 0
  IndexerWeights indexer;        ///< ratio 4
};

/// Rounding of one row on its way into a cache: what a reader gets back.
void round_cache_row(std::span<double> row, CacheRounding rounding, int rope_dim);
/// The same for an indexer key or one head of an indexer query; FP8 keeps its scale in the values.
void round_index_row(std::span<double> row, const Roundings& roundings);

/// Every entry of the sequence x [T, hidden], before its cache rounding: project, pool, norm,
/// rotate (compressor.md 1).
Matrix compress(const Matrix& x, const CompressorWeights& weights, const AttentionShape& shape,
                int64_t width);

/// Results for the queries at `positions`; names as in the golden manifest.
struct AttentionTrace {
  Matrix q;                                ///< [P, heads * head_dim] after norm and RoPE
  Matrix kv;                               ///< [T, head_dim] as attended
  Matrix compressed;                       ///< [T / ratio, head_dim] as attended
  Matrix index_scores;                     ///< [P, T / 4], not masked
  std::vector<std::vector<int32_t>> topk;  ///< per position, ascending
  Matrix attn_before_o;                    ///< [P, heads * head_dim] after the inverse RoPE
  Matrix out;                              ///< [P, hidden]
};
/// x [T, hidden] is the layer's input after attn_norm; queries are evaluated at `positions` only.
AttentionTrace attention(const Matrix& x, const std::vector<int64_t>& positions,
                         const AttentionWeights& weights, const AttentionShape& shape,
                         const Roundings& roundings);

/// A linear with the roundings of its place: input quantised when the weight is, output to bf16.
Matrix rounded_linear(const Matrix& x, const Weight& w, const Roundings& roundings);
/// Rounds to bf16 where activations are.
void round_activations(std::span<double> values, const Roundings& roundings);

}  // namespace oracle
