// sm90_attend: one token x 64 heads against a chain of row blocks.
//
// Problem   attend.h; rows of 512 dims, blocks of 64 rows
// Tiling    item = (token, 64 heads, chain), dealt out to persistent CTAs, first chains first. Four
//           warpgroups:
//             0     S = Q K^T [64 x 64] over 512 dims, softmax, P (bf16) to shared memory
//             1, 2  O[64 x 256] += P V, epilogue
//             3     gathers rows and writes them as bf16 into a stage: 64 rows x 512, K as it lies
//                   and V through the transposing descriptor (attend_sm90_loader.cuh)
//           Two stages. Half of the query is read from shared memory, half lives in registers.
// Budget    a block and 64 heads: 2 x 1024 clocks of wgmma; shared memory 336 KB = 2690 clocks;
//           584 B x 64 rows = 37 KB. Limits and measurements: docs/kernels/attend_sm90.md
// Launch    min(items, SMs) CTAs of 512 threads, smem = sizeof(SharedStorage), 1 CTA/SM
// Contract  q, out, rows 16-byte aligned (fp8_ds_mla: 8); rows that are masked (-1, outside the
//           range) are never read and contribute exactly nothing: their tile rows are zeros, their
//           P is 0; a token without rows gets 0 and lse -inf; bits depend on the token's own rows
//           only
// Numerics  q.k and p.v accumulate in f32, p rounded to bf16, sums of unrounded p. The reference
//           maximum follows the true one only when that has grown by more than 2^8: O is then
//           rarely rescaled, and p <= 2^8 is as exact in bf16 as p <= 1
#pragma once
#include <cuda_fp16.h>

#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_loader.cuh"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia::sm90_attend {

constexpr float kNoMaximum = -1e30f;  // finite: differences of it are numbers

__device__ __forceinline__ BlockHeader read_header(const BlockHeader& header) {
  const uint2 words = load_shared_2(shared_address(&header));
  return {static_cast<int>(words.x), words.y & 0xff, words.y >> 8 & 0xffff, words.y >> 24};
}

/// Index of an item's partial results.
__device__ __forceinline__ int64_t chain_slot(const AttendSm90Args& args,
                                              const BlockHeader& header) {
  return ((static_cast<int64_t>(header.token) << args.log2_tiles) + header.tile) *
             args.attend.max_chains +
         header.chain;
}

/// x[i] of lane j of a quad goes to x[j] of its lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int quad) {
  const bool odd = (quad & 1) != 0, upper = (quad & 2) != 0;
  const uint32_t t0 = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const uint32_t t1 = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  (odd ? x[0] : x[1]) = t0;
  (odd ? x[2] : x[3]) = t1;
  const uint32_t t2 = __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2);
  const uint32_t t3 = __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
  (upper ? x[0] : x[2]) = t2;
  (upper ? x[1] : x[3]) = t3;
}

/// Dims of two heads as A fragments, in two steps. load_fragments reads them 16 bytes at a time:
/// few loads, as many of them under way hold up everybody's shared memory. order_fragments, when
/// they have come: fragment k, 4 registers, is of dims 16 k ...
template <int kRegisters>
__device__ __forceinline__ void load_fragments(const uint16_t* low, const uint16_t* high, int quad,
                                               uint32_t (&fragments)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 8) {
    load_global_constant_16(low + i * 4 + quad * 8, fragments + i);
    load_global_constant_16(high + i * 4 + quad * 8, fragments + i + 4);
  }
}
template <int kRegisters>
__device__ __forceinline__ void order_fragments(uint32_t (&fragments)[kRegisters], int quad) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 8) {
    uint32_t low[4], high[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      low[j] = fragments[i + j];
      high[j] = fragments[i + 4 + j];
    }
    transpose_quad(low, quad);
    transpose_quad(high, quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      fragments[i + 2 * j] = low[j];
      fragments[i + 2 * j + 1] = high[j];
    }
  }
}

/// The query of an item. Panels 0-3 (dims 0-255) go to shared memory, asynchronously; dims 256-511
/// to registers, as A fragments of 16 products.
template <typename Traits>
struct Query {
  uint32_t fragments[64];

  __device__ __forceinline__ void load(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                       const BlockHeader& header, int thread) {
    const int lane = thread & 31, warp = thread >> 5;
    const int last_head = args.attend.num_heads - header.tile * 64 - 1;
    const uint16_t* q = args.attend.q + header.token * args.attend.q_token_stride +
                        header.tile * 64 * args.attend.q_head_stride;
    // Heads past the last one are copies of it; nobody stores what becomes of them.
    const auto row_of = [&](int head) {
      return q + min(head, last_head) * args.attend.q_head_stride;
    };
    const int head = warp * 16 + (lane >> 2);
    load_fragments(row_of(head) + 256, row_of(head + 8) + 256, lane & 3, fragments);
    // A warp copies 512 bytes of a head at a time; 16-byte unit `lane`.
    const uint32_t panel = shared_address(shared.query[lane >> 3]);
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      const int r = i * 4 + warp;
      copy_async_stream(panel + r * 128 + (((lane & 7) ^ (r & 7)) << 4), row_of(r) + lane * 8, 16);
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void finish(int quad) {
    order_fragments(fragments, quad);
    copy_async_wait<0>();
    fence_proxy_async();
  }
};

// ---- softmax of a block. S and P lie in a thread as accumulators of a product do: s[4 g], ... =
// (head row, keys 8 g + 2 quad, + 1), (head row + 8, the same keys).

/// The mask of 8 kGroups rows, as the loader writes it.
template <int kGroups>
struct RowMask {
  uint32_t words[kGroups];
};
template <int kGroups>
__device__ __forceinline__ RowMask<kGroups> load_mask(const uint32_t* from) {
  RowMask<kGroups> mask;
#pragma unroll
  for (int i = 0; i < kGroups; i += 4) {
    const uint4 four = load_shared_16(shared_address(from + i));
    mask.words[i] = four.x;
    mask.words[i + 1] = four.y;
    mask.words[i + 2] = four.z;
    mask.words[i + 3] = four.w;
  }
  return mask;
}
template <int kGroups>
__device__ __forceinline__ void mask_scores(float (&s)[4 * kGroups], const RowMask<kGroups>& mask,
                                            int quad) {
  uint32_t all = ~0u;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) all &= mask.words[g];
  if (all == ~0u) return;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if ((mask.words[g] >> (8 * quad + 4 * e) & 1) == 0)
        s[4 * g + e] = s[4 * g + 2 + e] = -INFINITY;
    }
  }
}

/// Largest score of a block for both heads of a thread, base 2; the same in all of a quad.
__device__ __forceinline__ void block_maxima(const float (&s)[32], float scale_log2,
                                             float (&largest)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x = s[2 * h];
#pragma unroll
    for (int g = 0; g < 8; ++g) x = fmaxf(x, fmaxf(s[4 * g + 2 * h], s[4 * g + 2 * h + 1]));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    largest[h] = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * scale_log2;
  }
}
/// The reference maximum follows that of a block; what came before must be multiplied by the
/// result.
__device__ __forceinline__ float move_reference(float largest, float& max) {
  if (!(largest > max + 8.f)) return 1.f;
  const float alpha = exp2_approx(max - largest);
  max = largest;
  return alpha;
}
/// P = 2^(scale s - max) in bf16, and the sum over this thread's keys before it is rounded.
__device__ __forceinline__ void block_weights(const float (&s)[32], float scale_log2,
                                              const float (&max)[2], float (&sum)[2],
                                              uint32_t (&p)[16]) {
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int g = 0; g < 8; ++g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float p0 = exp2_approx(fmaf(s[4 * g + 2 * h], scale_log2, -max[h]));
      const float p1 = exp2_approx(fmaf(s[4 * g + 2 * h + 1], scale_log2, -max[h]));
      sum[h] += p0 + p1;
      p[2 * g + h] = pack_bf16x2(p0, p1);
    }
  }
}
/// Sum of a thread's keys so far and in a further block: one term a block, so that CTAs that hold
/// different blocks can add up alike.
__device__ __forceinline__ float add_block_sum(float sum, float alpha, float block_sum) {
  return __fmaf_rn(sum, alpha, block_sum);
}

/// Weights of a block in bf16; sums and maxima go on from the blocks before, O must be multiplied
/// by alpha.
__device__ __forceinline__ void softmax(const float (&s)[32], float scale_log2, float (&max)[2],
                                        float (&sum)[2], float (&alpha)[2], uint32_t (&p)[16]) {
  float largest[2], block_sum[2];
  block_maxima(s, scale_log2, largest);
#pragma unroll
  for (int h = 0; h < 2; ++h) alpha[h] = move_reference(largest[h], max[h]);
  block_weights(s, scale_log2, max, block_sum, p);
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = add_block_sum(sum[h], alpha[h], block_sum[h]);
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

/// Maximum and sum of a finished chain for heads row and row + 8.
__device__ __forceinline__ void store_row_sums(float2* to, int row, int quad, const float (&max)[2],
                                               float (&sum)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    if (quad == 0) to[row + 8 * h] = make_float2(max[h], sum[h]);
  }
}

template <typename Traits>
__device__ __forceinline__ void score_role(const AttendSm90Args& args,
                                           SharedStorage<Traits>& shared, int thread) {
  const int lane = thread & 31, warp = thread >> 5, quad = lane & 3;
  const int row = warp * 16 + (lane >> 2);  // this thread's heads: row, row + 8
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
  if (shared.walk.headers[0].token < 0) return;
  Query<Traits> query;
  query.load(args, shared, read_header(shared.walk.headers[0]), thread);
  const uint64_t query_operand = swizzled_operand(shared_address(shared.query), 16, 1024);

  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0;) {
    query.finish(quad);
    barrier_sync(kScoreBarrier, 128);
    float max[2] = {kNoMaximum, kNoMaximum}, sum[2] = {0.f, 0.f};
    for (bool last = false; !last; ++block) {
      const int stage = block & 1;
      mbarrier_poll(shared_address(&shared.barriers.rows_full[stage]), phase_of<2>(block));

      // S = Q K^T
      float s[32];
      const uint64_t rows = swizzled_operand(shared_address(shared.rows[stage]), 16, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        const uint64_t at = operand_offset((k >> 2) * Traits::kPanelBytes + (k & 3) * 32);
        if (k < 16) {
          wgmma_64x64_shared(s, query_operand + at, rows + at, k != 0);
        } else {
          const uint32_t* a = query.fragments + (k - 16) * 4;
          wgmma_64x64_registers(s, a[0], a[1], a[2], a[3], rows + at);
        }
      }
      wgmma_commit();
      last = (shared.walk.headers[block % Traits::kHeaderSlots].flags & kLastBlock) != 0;
      wgmma_wait<0>();

      if (last) {  // all warps are done with the query: the next one can come
        const BlockHeader next =
            read_header(shared.walk.headers[(block + 1) % Traits::kHeaderSlots]);
        barrier_sync(kScoreBarrier, 128);
        if (next.token >= 0) query.load(args, shared, next, thread_of_role());
      }

      mask_scores(s, load_mask<8>(shared.mask[stage]), quad);
      float alpha[2];
      uint32_t p[16];
      softmax(s, args.attend.scale_log2, max, sum, alpha, p);
      if (block > 0) {
        mbarrier_poll(shared_address(&shared.barriers.p_empty), phase_of<1>(block) ^ 1);
      }
      store_weights(shared.p, p, warp, lane);
      if (quad == 0) {
        shared.alpha[row] = alpha[0];
        shared.alpha[row + 8] = alpha[1];
      }
      if (last) store_row_sums(shared.sums, row, quad, max, sum);
      fence_proxy_async();
      mbarrier_arrive(shared_address(&shared.barriers.p_full));
    }
  }
}

/// Writes 64 heads x kColumns dims from `column` on (two rows a thread) as bf16: the words of a
/// quad are transposed, so that a thread stores 16 bytes.
template <int kColumns, typename Value>
__device__ __forceinline__ void store_output(const AttendSm90Args& args, const BlockHeader& item,
                                             int column, int row, int quad,
                                             const float (&inverse)[2], const Value& value) {
  const int head = item.tile * 64 + row;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint16_t* out = args.attend.out + item.token * args.attend.out_token_stride +
                    (head + 8 * h) * args.attend.out_head_stride + column + quad * 8;
    asm volatile("" : "+l"(out));  // one address register, immediate offsets
    const bool stored = head + 8 * h < args.attend.num_heads;
#pragma unroll
    for (int g = 0; g < kColumns / 32; ++g) {
      uint32_t x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = (4 * g + c) * 4 + 2 * h;
        x[c] = pack_bf16x2(value(i) * inverse[h], value(i + 1) * inverse[h]);
      }
      transpose_quad(x, quad);
      if (stored) {
        *reinterpret_cast<uint4*>(out + g * 32) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

/// Log-sum-exp of a token, or maximum and sum of one of its chains, for heads row and row + 8.
__device__ __forceinline__ void store_sums(const AttendSm90Args& args, const BlockHeader& item,
                                           int row, const float2 (&sums)[2]) {
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int head = item.tile * 64 + row + 8 * h;
    const float2 of_head = h == 0 ? sums[0] : sums[1];
    const bool any = of_head.y > 0.f;
    if ((item.flags & kOnlyChain) == 0) {
      args.chains.sums[chain_slot(args, item) * 64 + row + 8 * h] =
          make_float2(any ? of_head.x : -INFINITY, of_head.y);
    } else if (args.attend.lse != nullptr && head < args.attend.num_heads) {
      args.attend.lse[static_cast<int64_t>(item.token) * args.attend.num_heads + head] =
          any ? log_sum_exp(of_head.x, of_head.y) : -INFINITY;
    }
  }
}

/// Factors of the accumulators of heads row and row + 8.
__device__ __forceinline__ void inverse_denominators(const AttendSm90Args& args,
                                                     const BlockHeader& item, int row,
                                                     const float2 (&sums)[2], float (&inverse)[2]) {
  const float* sinks = args.attend.sink;
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int head = item.tile * 64 + row + 8 * h;
    const float2 of_head = h == 0 ? sums[0] : sums[1];
    const bool has_sink = sinks != nullptr && head < args.attend.num_heads;
    const float sink = has_sink ? __ldg(sinks + head) : -INFINITY;
    const float factor = of_head.y > 0.f ? inverse_denominator(of_head.x, of_head.y, sink) : 0.f;
    (h == 0 ? inverse[0] : inverse[1]) = factor;
  }
}

/// First of this thread's two rows of an accumulator; the other one is 8 below.
__device__ __forceinline__ int row_of_thread() {
  return thread_of_role() / 32 * 16 + thread_of_role() % 32 / 4;
}

/// What is left of an item: half of the dims of 64 heads.
template <typename Value>
__device__ __forceinline__ void store_item(const AttendSm90Args& args, const BlockHeader& item,
                                           int half, const float2 (&sums)[2], const Value& o) {
  const int thread = thread_of_role(), quad = thread & 3, row = row_of_thread();
  if (half == 0 && quad == 0) store_sums(args, item, row, sums);
  if (__any_sync(~0u, (item.flags & kOnlyChain) != 0)) {
    float inverse[2];
    inverse_denominators(args, item, row, sums, inverse);
    store_output<256>(args, item, half * 256, row, quad, inverse, o);
  } else {
    float4* values = args.chains.values + chain_slot(args, item) * (32 * 256) + half * 128 + thread;
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      __stcg(values + k * 256, make_float4(o(4 * k), o(4 * k + 1), o(4 * k + 2), o(4 * k + 3)));
    }
  }
}

/// O[64 x 256] of every item.
template <typename Traits>
__device__ __forceinline__ void output_role(const AttendSm90Args& args,
                                            SharedStorage<Traits>& shared) {
  // Read anew wherever it is used: registers are short.
  const auto half = [] { return role_of_thread() - 1; };
  const BlockWalk<Traits> walk{args, shared.walk};
  // Votes, so that the compiler sees whole warps: else it doubles every shuffle of the epilogue.
  const auto exists = [&](int block) {
    return __any_sync(~0u, shared.walk.headers[block % Traits::kHeaderSlots].token >= 0);
  };
  for (int block = 0; block == 0 || exists(block);) {
    float o0[64], o1[64];  // dims 0-127 and 128-255 of the half
    const auto o = [&](int i) -> float& { return i < 64 ? o0[i & 63] : o1[i & 63]; };
    // Zeroed here: accumulators that only products write stay alive for ptxas during the epilogue.
#pragma unroll
    for (int i = 0; i < 64; ++i) o0[i] = o1[i] = 0.f;
    float2 sums[2];
    for (bool last = false; !last; ++block) {
      const int stage = block % Traits::kStages;
      if (block == 0) {
        if (half() == 0) walk.get_ahead(shared.barriers);
        mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
        if (!exists(0)) return;
      }
      if (half() == 0) walk.step(block);
      mbarrier_poll(shared_address(&shared.barriers.p_full), phase_of<1>(block));
      const uint32_t flags = shared.walk.headers[block % Traits::kHeaderSlots].flags;
      last = __any_sync(~0u, (flags & kLastBlock) != 0);
      const float a0 = shared.alpha[row_of_thread()], a1 = shared.alpha[row_of_thread() + 8];
      if ((flags & kFirstBlock) == 0 && __any_sync(~0u, a0 != 1.f || a1 != 1.f)) {
#pragma unroll
        for (int i = 0; i < 128; i += 4) {
          o(i) *= a0;
          o(i + 1) *= a0;
          o(i + 2) *= a1;
          o(i + 3) *= a1;
        }
      }
      const uint32_t values = shared_address(shared.rows[stage][half() * 4]);
      const uint64_t values_operand =
          swizzled_operand(values, Traits::kPanelStride, Traits::kGroupStride);
      const uint64_t p_operand = swizzled_operand(shared_address(shared.p), 16, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t p_at = p_operand + operand_offset(k * 32);
        const uint64_t values_at = values_operand + operand_offset(k * 2 * Traits::kGroupStride);
        wgmma_64x128_shared(o0, p_at, values_at);
        wgmma_64x128_shared(o1, p_at, values_at + operand_offset(2 * Traits::kPanelStride));
      }
      wgmma_commit();
      wgmma_wait<0>();
      mbarrier_arrive(shared_address(&shared.barriers.rows_empty[stage]));
      if (last) {
        sums[0] = shared.sums[row_of_thread()];
        sums[1] = shared.sums[row_of_thread() + 8];
      }
      mbarrier_arrive(shared_address(&shared.barriers.p_empty));
    }
    store_item(args, read_header(shared.walk.headers[(block - 1) % Traits::kHeaderSlots]), half(),
               sums, o);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendSm90Args args) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(storage);
  const int role = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  follow_kernels_before();
  if (role == 1) BlockWalk<Traits>{args, shared.walk}.start();
  if (threadIdx.x == 0) init_barriers(shared.barriers);
  __syncthreads();
  if (role == 0) {
    decrease_registers<Traits::kScoreRegisters>();
    score_role(args, shared, thread_of_role());
  } else if (role == 3) {
    decrease_registers<Traits::kLoaderRegisters>();
    if constexpr (Traits::kConverts) {
      load_and_convert(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
    } else {
      load_bf16(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
    }
  } else {
    increase_registers<Traits::kOutputRegisters>();
    output_role<Traits>(args, shared);
  }
}

}  // namespace dsv4::nvidia::sm90_attend

namespace dsv4::nvidia {

template <KvFormat kFormat>
void launch_attend_sm90(const AttendSm90Args& args, int grid, cudaStream_t stream) {
  using Traits = sm90_attend::Traits<kFormat>;
  launch<sm90_attend::attend_kernel<Traits>>({dim3(static_cast<unsigned>(grid)), Traits::kThreads,
                                              sizeof(sm90_attend::SharedStorage<Traits>)},
                                             stream, args);
}

}  // namespace dsv4::nvidia
