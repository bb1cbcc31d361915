// The inner loops of the row-wise operations, one table per ISA. All tables give the same bits; the
// operations around them (threads, addresses, scratch) are compiled once.
#pragma once
#include <cstdint>

#include "dsv4/dtype.h"

namespace dsv4::cpu {

/// cos and sin of one position (rope.h); with sin negated it is the inverse rotation.
struct RopeTable {
  const float* cos;  ///< [pairs]
  const float* sin;  ///< [pairs]
  int32_t pairs;     ///< rotates the last 2 * pairs elements of a row
};

/// One pooled token of a compressor entry: `width` values and scores, at the right half already.
struct PoolRow {
  const float* value;
  const float* score;
  const float* ape;  ///< added to the scores; null when they hold it (rows of the state)
};

/// How index_query leaves its values.
enum class IndexQuantise : uint8_t { kNone, kFp8Row, kMxfp4 };

/// "act" rows are kBf16 or kF32. Rows are contiguous; counts need not be multiples of anything.
struct RowKernels {
  /// out = weight * (x / sqrt(mean x^2 + eps)); out may be x.
  void (*rms_norm)(const void* x, DType x_dtype, const void* weight, DType weight_dtype,
                   int64_t count, float eps, void* out, DType out_dtype);
  /// head /= sqrt(mean^2 + eps), then RoPE, one rounding; in place.
  void (*qnorm_rope)(void* head, DType act, int64_t count, float eps, const RopeTable& rope);
  /// RoPE, one rounding, in place; `values` [count] gets the rounded row.
  void (*rope_kv)(void* row, DType act, int64_t count, const RopeTable& rope, float* values);
  /// out_c = sum_k softmax_k(score_k)_c value_k,c; `count` >= 1 rows in ascending order.
  void (*pool)(const PoolRow* rows, int64_t count, int64_t width, float* out);
  /// Norm, RoPE, optional Hadamard in f32; then rounding to bf16 when `round`. In place.
  void (*norm_entry)(float* row, int64_t width, const void* weight, DType weight_dtype, float eps,
                     const RopeTable& rope, bool hadamard, bool round);
  /// state = [v | s + ape]; gates likewise without ape; each half `half` long.
  void (*state_row)(const float* gates, const float* ape, int64_t half, float* state);
  /// RoPE, optional Hadamard, quantisation of one indexer head. `buffer` [count] f32.
  /// @return scale of the values that are not multiplied by it: 2^e in kFp8Row, else 1.
  float (*index_query)(const void* head, DType act, int64_t count, const RopeTable& rope,
                       bool hadamard, IndexQuantise quantise, float* buffer, void* out);
  /// Rotation (`rope` holds the negated sin), then rounding, or quantisation and dequantisation in
  /// groups of 128. `buffer` [count] f32.
  void (*inverse_rope)(const void* head, DType act, int64_t count, const RopeTable& rope,
                       bool quantise, float* buffer, void* out, DType out_dtype);
  /// out[t * (rows + 1) + r] = fn[r] . x[t], and at r = rows: x[t] . x[t]. At most kHcDotCols
  /// columns.
  void (*hc_dots)(const void* x, DType act, int64_t x_stride, int64_t tokens, const float* fn,
                  int64_t fn_stride, int64_t rows, int64_t cols, float* out);
  /// out = sum_i coefficient_i * stream_i, i ascending; stream i at streams + i * stride.
  void (*hc_mix)(const void* streams, DType act, int64_t stride, int64_t num_streams,
                 const float* coefficients, int64_t count, void* out);
  /// streams[j] = post_j * f + sum_i comb[i * num_streams + j] * streams[i], in place.
  void (*hc_post)(const void* f, DType act, const float* post, const float* comb,
                  int64_t num_streams, int64_t stride, int64_t count, void* streams);
  void (*exp)(float* values, int64_t count);      ///< in place
  void (*sigmoid)(float* values, int64_t count);  ///< in place
  /// out = sqrt(softplus(logits)).
  void (*sqrt_softplus)(const float* logits, int64_t count, float* out);
  /// out = silu(min(g, limit)) * clamp(u, limit) * weight; no clamps for limit <= 0.
  void (*swiglu)(const float* g, const float* u, float limit, float weight, int64_t count,
                 void* out, DType act);
  void (*add)(const float* x, int64_t count, float* sum);  ///< sum += x
  /// Copies with one rounding at most.
  void (*convert)(const void* x, DType x_dtype, int64_t count, void* out, DType out_dtype);
};

constexpr int64_t kHcDotCols = 2048;
constexpr int64_t kMaxHcStreams = 8;

extern const RowKernels kRowKernelsAvx512;
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsPortable;

/// The best table of this machine, for operations outside of the candidate list.
const RowKernels& best_row_kernels();

}  // namespace dsv4::cpu
