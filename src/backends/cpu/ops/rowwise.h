// The row-wise operations over a table of row kernels: threads, addresses and scratch; the
// arithmetic is in the kernels. Contracts: ops/ops.h.
#pragma once
#include <algorithm>

#include "backends/cpu/ops/rowwise_kernels.h"
#include "backends/cpu/parallel.h"
#include "core/checked_math.h"
#include "ops/ops.h"

namespace dsv4::cpu {

void rms_norm(const RowKernels& kernels, const RmsNormParams& params, const OpContext& context);
void qnorm_rope_insert(const RowKernels& kernels, const QnormRopeInsertParams& params,
                       const OpContext& context);
void inverse_rope(const RowKernels& kernels, const InverseRopeParams& params,
                  const OpContext& context);
void compress(const RowKernels& kernels, const CompressParams& params, const OpContext& context);
void index_query(const RowKernels& kernels, const IndexQueryParams& params,
                 const OpContext& context);
void embed(const RowKernels& kernels, const EmbedParams& params, const OpContext& context);
void hc_pre(const RowKernels& kernels, const HcPreParams& params, const OpContext& context);
void hc_post(const RowKernels& kernels, const HcPostParams& params, const OpContext& context);
void hc_head(const RowKernels& kernels, const HcHeadParams& params, const OpContext& context);
void route(const RowKernels& kernels, const RouteParams& params, const OpContext& context);

/// Upper bound of what hc_pre and hc_head take.
int64_t hyper_connections_scratch_bytes(const ScratchLimits& limits);

// ---- addresses

inline const void* row_at(const ConstTensor& tensor, int64_t row) {
  return static_cast<const char*>(tensor.data) + row * tensor.strides[0] * size_of(tensor.dtype);
}
inline void* row_at(const Tensor& tensor, int64_t row) {
  return static_cast<char*>(tensor.data) + row * tensor.strides[0] * size_of(tensor.dtype);
}
inline const void* row_at(const ConstTensor& tensor, int64_t row, int64_t column_row) {
  return static_cast<const char*>(tensor.data) +
         (row * tensor.strides[0] + column_row * tensor.strides[1]) * size_of(tensor.dtype);
}
inline void* row_at(const Tensor& tensor, int64_t row, int64_t column_row) {
  return static_cast<char*>(tensor.data) +
         (row * tensor.strides[0] + column_row * tensor.strides[1]) * size_of(tensor.dtype);
}

/// One f32 row of scratch per thread, a multiple of 64 bytes apart.
class ThreadRows {
 public:
  ThreadRows(const OpContext& context, int64_t elems)
      : stride_(round_up(elems, 16)),
        base_(context.scratch->take_array<float>(num_threads(context.stream) * stride_)) {}
  float* of(int thread_idx) const { return base_ + thread_idx * stride_; }
  static int64_t bytes(int threads, int64_t elems) {
    return threads * round_up(elems, 16) * int64_t{sizeof(float)} + Arena::kAlignment;
  }

 private:
  int64_t stride_;
  float* base_;
};

/// f(token, head_begin, head_end, thread_idx): whole tokens where there are enough of them, else
/// parts of a token's heads. Every part computes its token's angles, so parts are as few as
/// threads.
template <typename F>
void parallel_heads(Stream stream, int64_t tokens, int64_t heads, F&& f) {
  if (tokens == 0 || heads == 0) return;
  const int64_t threads = num_threads(stream);
  const int64_t groups = tokens >= 2 * threads ? 1 : std::min(heads, ceil_div(threads, tokens));
  const int64_t group_heads = ceil_div(heads, groups);
  parallel_chunks(stream, tokens * groups, 1, [&](int64_t begin, int64_t end, int thread_idx) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item % groups * group_heads;
      f(item / groups, head, std::min(heads, head + group_heads), thread_idx);
    }
  });
}

}  // namespace dsv4::cpu
