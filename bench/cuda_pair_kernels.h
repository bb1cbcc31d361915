// Kernels of the pair benches: inputs in the form that the other side wants, and the comparison of
// two results.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "dsv4/cache.h"
#include "dsv4/dtype.h"

namespace dsv4::nvidia::bench {

/// out[i, :] = row slots[i] of `cache` (fp8_ds_mla) in bf16; out [count, 512], exact.
void gather_bf16(const CacheView& cache, const int32_t* slots, int64_t count, void* out,
                 cudaStream_t stream);

/// Two results of the same attention. `theirs` may have more heads, which are not read.
struct Comparison {
  const void *ours, *theirs;         ///< [tokens, heads or their_heads, 512] bf16
  const float *our_lse, *their_lse;  ///< natural logs, sink excluded
  int64_t tokens;
  int heads, their_heads;
};
/// worst[0] = max over rows of |ours - theirs| / |theirs| (Euclidean norms of a token's head),
/// worst[1] = max |our lse - their lse|; infinity where something is no number. `worst` [2] f32 on
/// the device, zero before.
void compare(const Comparison& what, float* worst, cudaStream_t stream);

/// Rows of bf16 or f32 numbers, `stride` elements apart.
struct RowsView {
  const void* data;
  int64_t stride;
};
/// worst[0] = max over rows of |ours - theirs| / |theirs| (Euclidean norms).
void compare_rows(DType dtype, RowsView ours, RowsView theirs, int64_t rows, int64_t cols,
                  float* worst, cudaStream_t stream);

/// out[t, g, c] = code[t, g, c] scale[g, c / 128, t] in bf16: the input of a product with scales of
/// powers of two, exact. scale [groups, cols / 128, scale_tokens].
void expand_codes(const void* codes, const float* scale, int64_t scale_tokens, int64_t tokens,
                  int groups, int cols, void* out, cudaStream_t stream);

}  // namespace dsv4::nvidia::bench
