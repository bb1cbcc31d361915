// Compressor step (compressor.md 1): entries first, then the state ring.
#include "backends/cpu/ops/rope.h"
#include "backends/cpu/ops/rowwise.h"
#include "cache/kv_format.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kMaxPooledTokens = 1024;

// One call's numbers, and where the row of a position lives: `gates` of this step or the ring.
struct Compressor {
  const CompressParams& params;
  int64_t ratio, windows, width, half;  // half = windows * width: length of v, and of s

  explicit Compressor(const CompressParams& p)
      : params(p),
        ratio(p.ratio->ratio),
        windows(p.overlap ? 2 : 1),
        width(p.cache.row_elems),
        half(windows * width) {
    DSV4_CHECK(pooled_tokens() <= kMaxPooledTokens && p.gates.shape[1] == 2 * half);
  }
  int64_t pooled_tokens() const { return windows * ratio; }

  // Both sources hold the same f32 numbers: a ring row holds s + ape as the sum below gives it, so
  // results do not depend on where a chunk began.
  PoolRow row(int32_t sequence, int64_t position, int64_t channel) const {
    const PlanView& plan = *params.plan;
    const int64_t context = plan.context_len[sequence];
    if (position >= context) {
      const int64_t token = plan.query_start[sequence] + (position - context);
      const auto* gates = static_cast<const float*>(row_at(params.gates, token));
      const auto* ape = static_cast<const float*>(row_at(params.ape, position % ratio));
      return {gates + channel, gates + half + channel, ape + channel};
    }
    const float* state = ring_row(sequence, position);
    return {state + channel, state + half + channel, nullptr};
  }
  float* ring_row(int32_t sequence, int64_t position) const {
    const StateView& state = params.state;
    return state.base + params.plan->state_slot[sequence] * state.slot_stride_elems +
           position % state.ring_rows * state.row_elems;
  }

  // Rows pooled by the entry whose last token is `last`, ascending. The window before the entry's
  // own gives its first half of channels; positions before 0 do not exist.
  int64_t gather(int32_t sequence, int64_t last, PoolRow* rows) const {
    int64_t count = 0;
    const int64_t own = last - ratio + 1;
    for (int64_t p = last - pooled_tokens() + 1; p <= last; ++p) {
      if (p < 0) continue;
      rows[count++] = row(sequence, p, windows == 2 && p >= own ? width : 0);
    }
    return count;
  }
};

}  // namespace

void compress(const RowKernels& kernels, const CompressParams& params, const OpContext& context) {
  const Compressor compressor(params);
  const PlanView& plan = *params.plan;
  const int64_t width = compressor.width;
  Arena::Scope scope(*context.scratch);
  const ThreadRows buffers(context, width);

  // Four tokens hold one entry at ratio 4, and decode batches spread over the threads.
  constexpr int64_t kChunkTokens = 4;
  parallel_chunks(
      context.stream, plan.num_tokens, kChunkTokens,
      [&](int64_t begin, int64_t end, int thread_idx) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t slot = params.ratio->slot_mapping[t];
          if (slot < 0) continue;
          const int64_t position = plan.positions[t];
          PoolRow rows[kMaxPooledTokens];
          const int64_t count = compressor.gather(plan.token_to_seq[t], position, rows);
          RopeAngles angles(params.rope);
          float* entry = buffers.of(thread_idx);
          kernels.pool(rows, count, width, entry);
          kernels.norm_entry(entry, width, params.norm.data, params.norm.dtype, params.eps,
                             angles.at(position / compressor.ratio * compressor.ratio),
                             params.hadamard, params.activation == DType::kBf16);
          encode_row(params.cache, slot, entry);
          if (params.entries) {
            kernels.convert(entry, DType::kF32, width, row_at(params.entries, t), DType::kF32);
          }
        }
      });

  // The ring keeps the last rows of each sequence. Only now: entries above read older ones.
  parallel_chunks(context.stream, plan.num_tokens, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t sequence = plan.token_to_seq[t];
      const int64_t sequence_end = plan.query_start[sequence + 1];
      // Padding tokens claim sequence 0 but lie after the last one.
      if (t >= sequence_end || sequence_end - t > params.state.ring_rows) continue;
      const int64_t position = plan.positions[t];
      kernels.state_row(static_cast<const float*>(row_at(params.gates, t)),
                        static_cast<const float*>(row_at(params.ape, position % compressor.ratio)),
                        compressor.half, compressor.ring_row(sequence, position));
    }
  });
}

}  // namespace dsv4::cpu
