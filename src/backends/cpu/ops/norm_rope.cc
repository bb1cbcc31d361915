// Query norm, rotations and the window cache write (attention.md steps 3-5, 9).
#include <algorithm>

#include "backends/cpu/ops/rope.h"
#include "backends/cpu/ops/rowwise.h"
#include "cache/kv_format.h"

namespace dsv4::cpu {

void qnorm_rope_insert(const RowKernels& kernels, const QnormRopeInsertParams& params,
                       const OpContext& context) {
  const Tensor &q = params.q, &kv = params.kv;
  const int64_t tokens = kv.shape[0], head_dim = kv.shape[1];
  const int64_t heads = q ? q.shape[1] : 0;
  Arena::Scope scope(*context.scratch);
  const ThreadRows buffers(context, head_dim);
  parallel_heads(context.stream, tokens, std::max<int64_t>(1, heads),
                 [&](int64_t t, int64_t head_begin, int64_t head_end, int thread_idx) {
                   RopeAngles angles(params.rope);
                   const RopeTable& rope = angles.at(params.positions[t]);
                   for (int64_t h = head_begin; h < std::min(head_end, heads); ++h)
                     kernels.qnorm_rope(row_at(q, t, h), q.dtype, head_dim, params.eps, rope);
                   if (head_begin != 0) return;
                   if (params.kv_norm) {
                     kernels.rms_norm(row_at(kv, t), kv.dtype, params.kv_norm.data,
                                      params.kv_norm.dtype, head_dim, params.eps, row_at(kv, t),
                                      kv.dtype);
                   }
                   float* values = buffers.of(thread_idx);
                   kernels.rope_kv(row_at(kv, t), kv.dtype, head_dim, rope, values);
                   if (params.slot_mapping[t] >= 0)
                     encode_row(params.window, params.slot_mapping[t], values);
                 });
}

void inverse_rope(const RowKernels& kernels, const InverseRopeParams& params,
                  const OpContext& context) {
  const int64_t tokens = params.o.shape[0], heads = params.o.shape[1];
  const int64_t head_dim = params.o.shape[2];
  Arena::Scope scope(*context.scratch);
  const ThreadRows buffers(context, head_dim);
  parallel_heads(context.stream, tokens, heads,
                 [&](int64_t t, int64_t head_begin, int64_t head_end, int thread_idx) {
                   RopeAngles angles(params.rope, RopeDirection::kInverse);
                   const RopeTable& rope = angles.at(params.positions[t]);
                   for (int64_t h = head_begin; h < head_end; ++h) {
                     kernels.inverse_rope(row_at(params.o, t, h), params.o.dtype, head_dim, rope,
                                          params.quantise, buffers.of(thread_idx),
                                          row_at(params.out, t, h), params.out.dtype);
                   }
                 });
}

}  // namespace dsv4::cpu
