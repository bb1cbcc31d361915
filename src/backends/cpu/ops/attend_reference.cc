// The scalar candidate of attention: one loop per sum, as attend.h writes the order.
#include <algorithm>
#include <vector>

#include "backends/cpu/ops/attend.h"
#include "backends/cpu/ops/attend_arith.h"
#include "backends/cpu/ops/attend_reference.h"
#include "backends/cpu/parallel.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

float load(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kBf16 ? bf16_to_f32(static_cast<const uint16_t*>(data)[i])
                               : static_cast<const float*>(data)[i];
}

// Online softmax of one head over a chain of blocks.
struct Chain {
  float max = kMinusInfinity;
  float sum = 0.0f;
  float* o;  // [head_dim]
};

void accumulate_block(const BlockRows& block, const float* rows, const float* q, int dim,
                      float scale, bool round_p, Chain& chain) {
  float z[kMaxBlockRows];
  float max = chain.max;
  for (int r = 0; r < block.count; ++r) {
    if ((block.active >> r & 1) == 0) continue;
    const float* k = rows + r * dim;
    float acc = 0.0f;
    for (int i = 0; i < dim; i += 2) acc = dot_pair(acc, q[i], q[i + 1], k[i], k[i + 1]);
    z[r] = mul_flushed(acc, scale);
    max = max_lane(z[r], max);
  }
  const float alpha = exp2_flushed(chain.max - max);
  chain.sum = mul_flushed(chain.sum, alpha);
  float p[kMaxBlockRows];
  for (int r = 0; r < block.count; ++r) {
    const bool active = (block.active >> r & 1) != 0;
    const float weight = active ? exp2_flushed(z[r] - max) : 0.0f;
    if (active) chain.sum = add_flushed(chain.sum, weight);
    p[r] = round_p ? round_bf16(weight) : weight;
  }
  chain.max = max;
  for (int i = 0; i < dim; ++i) {
    float o = mul_flushed(chain.o[i], alpha);
    for (int r = 0; r < block.count; r += 2) {
      o = dot_pair(o, p[r], p[r + 1], rows[r * dim + i], rows[(r + 1) * dim + i]);
    }
    chain.o[i] = o;
  }
}

void merge(Chain& total, bool& has_total, const Chain& chain, int dim) {
  if (!has_total) {
    std::copy_n(chain.o, dim, total.o);
    total.max = chain.max;
    total.sum = chain.sum;
    has_total = true;
    return;
  }
  const MergeWeights w = merge_weights(total.max, total.sum, chain.max, chain.sum);
  for (int i = 0; i < dim; ++i) {
    total.o[i] = fma_flushed(chain.o[i], w.chain, mul_flushed(total.o[i], w.total));
  }
  total.max = w.max;
  total.sum = w.sum;
}

// Buffers of one thread.
struct Buffers {
  float *rows, *q, *chain_o, *total_o;
};

void attend_token(const AttendParams& params, int64_t token, const Buffers& buffers) {
  const int heads = static_cast<int>(params.q.shape[1]), dim = static_cast<int>(params.q.shape[2]);
  const float scale = log2_scale(params.softmax_scale);
  for (int head = 0; head < heads; ++head) {
    const int64_t q_offset = token * params.q.strides[0] + head * params.q.strides[1];
    for (int i = 0; i < dim; ++i) {
      buffers.q[i] = load(params.q.data, params.q.dtype, q_offset + i);
    }
    Chain total{kMinusInfinity, 0.0f, buffers.total_o};
    bool has_total = false;
    TokenBlocks blocks(params, token);
    for (int64_t c = 0; c < blocks.num_chains(); ++c) {
      blocks.select_chains(c, c + 1);
      Chain chain{kMinusInfinity, 0.0f, buffers.chain_o};
      std::fill_n(chain.o, dim, 0.0f);
      BlockRows block;
      int64_t of_chain;
      bool any = false;
      while (blocks.next(block, of_chain)) {
        DSV4_CHECK(of_chain == c);
        for (int r = 0; r < block.count; ++r) {
          decode_row_flushed(block.rows[r], block.format, dim, buffers.rows + r * dim);
        }
        accumulate_block(block, buffers.rows, buffers.q, dim, scale, params.round_p_to_bf16, chain);
        any = true;
      }
      if (any) merge(total, has_total, chain, dim);
    }
    const float factor =
        has_total ? inverse_denominator(total.max, total.sum,
                                        params.sink == nullptr ? kMinusInfinity : params.sink[head])
                  : 0.0f;
    const int64_t out_offset = token * params.out.strides[0] + head * params.out.strides[1];
    for (int i = 0; i < dim; ++i) {
      const float value = has_total ? mul_flushed(total.o[i], factor) : 0.0f;
      if (params.out.dtype == DType::kBf16) {
        params.out.as<uint16_t>()[out_offset + i] = bf16_flushed(value);
      } else {
        params.out.as<float>()[out_offset + i] = value;
      }
    }
    if (params.lse != nullptr) {
      params.lse[token * heads + head] =
          has_total ? log_sum_exp(total.max, total.sum) : kMinusInfinity;
    }
    if (params.max_logits != nullptr) {
      params.max_logits[token * heads + head] = has_total ? natural_max(total.max) : kMinusInfinity;
    }
  }
}

}  // namespace

void attend_reference(const AttendParams& params, const OpContext& context) {
  const int dim = static_cast<int>(params.q.shape[2]);
  DSV4_CHECK(dim % 2 == 0);
  const int threads = num_threads(context.stream);
  const int64_t elems = int64_t{kMaxBlockRows + 3} * dim;
  Arena::Scope scope(*context.scratch);
  float* scratch = context.scratch->take_array<float>(elems * threads);
  if (context.scratch->measuring()) return;
  parallel_chunks(context.stream, params.q.shape[0], 1,
                  [&](int64_t begin, int64_t end, int thread_idx) {
                    float* rows = scratch + (threads == 1 ? 0 : thread_idx) * elems;
                    float* after = rows + kMaxBlockRows * dim;
                    for (int64_t token = begin; token < end; ++token) {
                      attend_token(params, token, {rows, after, after + dim, after + 2 * dim});
                    }
                  });
}

}  // namespace dsv4::cpu
