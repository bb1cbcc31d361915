// Softmax of a block of scores, and the sums that an item leaves behind: shared by sm90_attend and
// its clusters.
#pragma once
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_walk.cuh"

namespace dsv4::nvidia::sm90_attend {

constexpr float kNoMaximum = -1e30f;  // finite: differences of it are numbers

__device__ __forceinline__ BlockHeader read_header(const BlockHeader& header) {
  const uint2 words = load_shared_2(shared_address(&header));
  return {static_cast<int>(words.x), words.y & 0xff, words.y >> 8 & 0xffff, words.y >> 24};
}

/// First of this thread's two rows of an accumulator; the other one is 8 below.
__device__ __forceinline__ int row_of_thread() {
  return thread_of_role() / 32 * 16 + thread_of_role() % 32 / 4;
}

/// Index of an item's partial results.
__device__ __forceinline__ int64_t chain_slot(const AttendSm90Args& args,
                                              const BlockHeader& header) {
  return ((static_cast<int64_t>(header.token) << args.log2_tiles) + header.tile) *
             args.attend.max_chains +
         header.chain;
}

// ---- softmax of a block. S and P lie in a thread as accumulators of a product do: s[4 g], ... =
// (head row, keys 8 g + 2 quad, + 1), (head row + 8, the same keys).

/// The mask of 8 kGroups rows, as the loader writes it.
template <int kGroups>
struct RowMask {
  uint32_t words[kGroups];

  __device__ __forceinline__ bool all() const {
    uint32_t rows = ~0u;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) rows &= words[g];
    return rows == ~0u;
  }
};
template <int kGroups>
__device__ __forceinline__ RowMask<kGroups> load_mask(uint32_t from) {
  RowMask<kGroups> mask;
#pragma unroll
  for (int i = 0; i < kGroups; i += 4) {
    const uint4 four = load_shared_16(from + i * 4);
    mask.words[i] = four.x;
    mask.words[i + 1] = four.y;
    mask.words[i + 2] = four.z;
    mask.words[i + 3] = four.w;
  }
  return mask;
}
template <int kGroups>
__device__ __forceinline__ RowMask<kGroups> load_mask(const uint32_t* from) {
  return load_mask<kGroups>(shared_address(from));
}
template <int kGroups>
__device__ __forceinline__ void mask_scores(float (&s)[4 * kGroups], const RowMask<kGroups>& mask,
                                            int quad) {
  if (mask.all()) return;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if ((mask.words[g] >> (8 * quad + 4 * e) & 1) == 0)
        s[4 * g + e] = s[4 * g + 2 + e] = -INFINITY;
    }
  }
}

/// Largest score of a thread's keys for both of its heads, base 2.
__device__ __forceinline__ void own_maxima(const float (&s)[32], float scale_log2,
                                           float (&largest)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x = s[2 * h];
#pragma unroll
    for (int g = 0; g < 8; ++g) x = fmaxf(x, fmaxf(s[4 * g + 2 * h], s[4 * g + 2 * h + 1]));
    largest[h] = __fmul_rn(x, scale_log2);
  }
}
/// The same of the whole block, from those of a quad.
__device__ __forceinline__ void quad_maxima(float (&largest)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
    largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
  }
}
__device__ __forceinline__ void block_maxima(const float (&s)[32], float scale_log2,
                                             float (&largest)[2]) {
  own_maxima(s, scale_log2, largest);
  quad_maxima(largest);
}
/// The reference maximum follows that of a block.
__device__ __forceinline__ float moved_reference(float largest, float max) {
  return largest > max + 8.f ? largest : max;
}
/// By which must be multiplied what came before it moved.
__device__ __forceinline__ float factor_of_move(float before, float max) {
  return max == before ? 1.f : exp2_approx(before - max);
}
__device__ __forceinline__ float move_reference(float largest, float& max) {
  const float before = max;
  max = moved_reference(largest, before);
  return factor_of_move(before, max);
}
/// P = 2^(scale s - max) in bf16, and the sum over this thread's keys before it is rounded: 16 keys
/// at a time, keys that are 8 apart first, as sm90_attend_heads has them.
__device__ __forceinline__ void block_weights(const float (&s)[32], float scale_log2,
                                              const float (&max)[2], float (&sum)[2],
                                              uint32_t (&p)[16]) {
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[2][2];  // keys 8 i + e
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[i][e] = exp2_approx(fmaf(s[4 * (g + i) + 2 * h + e], scale_log2, -max[h]));
        }
        p[2 * (g + i) + h] = pack_bf16x2(x[i][0], x[i][1]);
      }
      sum[h] += (x[0][0] + x[1][0]) + (x[0][1] + x[1][1]);
    }
  }
}
/// Sums of a thread's keys so far and in a further block: one term a block, so that CTAs that hold
/// different blocks can add up alike.
__device__ __forceinline__ float add_block_sum(float sum, float alpha, float block_sum) {
  return __fmaf_rn(sum, alpha, block_sum);
}
__device__ __forceinline__ void add_block_sums(const float (&alpha)[2], const float (&block_sum)[2],
                                               float (&sum)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = add_block_sum(sum[h], alpha[h], block_sum[h]);
}

/// The reference maxima go on from the blocks before; sums and O must be multiplied by alpha.
__device__ __forceinline__ void follow_maxima(const float (&s)[32], float scale_log2,
                                              float (&max)[2], float (&alpha)[2]) {
  float largest[2];
  own_maxima(s, scale_log2, largest);
  alpha[0] = alpha[1] = 1.f;
  // Few blocks move a reference. Where no thread's maximum does, that of a quad, which is one of
  // them, does not either, and nobody has to hear of it.
  if (__any_sync(~0u, moved_reference(largest[0], max[0]) != max[0] ||
                          moved_reference(largest[1], max[1]) != max[1])) {
    quad_maxima(largest);
#pragma unroll
    for (int h = 0; h < 2; ++h) alpha[h] = move_reference(largest[h], max[h]);
  }
}

/// P of 16 heads to shared memory, as a K-major operand.
__device__ __forceinline__ void store_weights(uint8_t* to, const uint32_t (&p)[16], int warp,
                                              int lane) {
  const uint32_t row = shared_address(to) + (warp * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * 128;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
    store_matrix_4(row + (((g + (lane >> 4)) ^ (lane & 7)) << 4), p[2 * g], p[2 * g + 1],
                   p[2 * g + 2], p[2 * g + 3]);
  }
}

/// Sinks of heads row and row + 8.
struct Sinks {
  float of[2] = {-INFINITY, -INFINITY};

  __device__ __forceinline__ void load(const AttendSm90Args& args, int tile, int row) {
    const float* sinks = args.attend.sink;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = tile * 64 + row + 8 * h;
      of[h] = sinks != nullptr && head < args.attend.num_heads ? __ldg(sinks + head) : -INFINITY;
    }
  }
};

/// Weights of the values of two parts, of which one is 1, in one number.
struct PartWeights {
  float bits;  // by_second, or by_first with the sign set

  __device__ __forceinline__ static PartWeights of(float by_first, float by_second) {
    return {by_first == 1.f ? by_second : -by_first};
  }
  __device__ __forceinline__ float by_first() const { return signbit(bits) ? -bits : 1.f; }
  __device__ __forceinline__ float by_second() const { return signbit(bits) ? 1.f : bits; }
};

/// Of one head: log-sum-exp of a token, or maximum and sum of one of its chains.
__device__ __forceinline__ void store_sum(const AttendSm90Args& args, const BlockHeader& item,
                                          int row, float max, float sum) {
  const int head = item.tile * 64 + row;
  const bool any = sum != 0.f;  // or NaN
  if ((item.flags & kOnlyChain) == 0) {
    args.chains.sums[chain_slot(args, item) * 64 + row] = make_float2(any ? max : -INFINITY, sum);
  } else if (args.attend.lse != nullptr && head < args.attend.num_heads) {
    args.attend.lse[static_cast<int64_t>(item.token) * args.attend.num_heads + head] =
        any ? log_sum_exp(max, sum) : -INFINITY;
  }
}

/// What is known of heads row and row + 8 at the end of a part or item goes to shared memory.
template <typename Traits, bool kParts>
__device__ __forceinline__ void finish_rows(SharedStorage<Traits>& shared, uint32_t flags, int row,
                                            int quad, const Sinks& sinks, float (&max)[2],
                                            float (&sum)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
  }
  if (quad != 0) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float2& of_head = shared.finished[row + 8 * h];
    if (kParts && (flags & kEndOfPart) != 0) {
      of_head = make_float2(max[h], sum[h]);
      continue;
    }
    PartWeights weights{};
    if (kParts && (flags & kLaterPart) != 0) {
      float2 both = of_head;
      const MergeWeights merged = merge_sums(both, make_float2(max[h], sum[h]));
      max[h] = both.x;
      sum[h] = both.y;
      weights = PartWeights::of(merged.by_total, merged.by_chain);
    }
    of_head = make_float2(sum[h] != 0.f ? inverse_denominator(max[h], sum[h], sinks.of[h]) : 0.f,
                          weights.bits);
    shared.sums[flags / kOddItem & 1][row + 8 * h] = make_float2(max[h], sum[h]);
  }
}

}  // namespace dsv4::nvidia::sm90_attend
