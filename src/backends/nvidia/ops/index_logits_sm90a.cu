// sm90_index_logits_fp8: scores of FP8 indexer keys by E4M3 warpgroup products.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; up to 64 heads x
//           128 dims; keys of 132 B in pages of any size
// Tiling    CTA = (group of tokens, one of `splits` shares of the keys); 3 warpgroups, each with
//           tiles of 64 keys of its own. Queries of the group lie in shared memory as E4M3 codes
//           (8 KiB a token). A tile goes from the page straight to registers, as the left operand,
//           and stays there for all tokens of its sequence: per token 4 products 64 x 64 x 32,
//           while the lanes fold the token before (ReLU, weight, sum over heads). Two tiles of
//           bytes are on their way meanwhile.
// Budget    decode: 136 B a key; 12 warps x 2 tiles x 2 KiB in flight a multiprocessor. Prefill: a
//           tile and token takes 128 clocks of the matrix unit and 84 issue slots of each scheduler
// Launch    grid (groups * splits), 384 threads, smem = 8.3 KiB * tokens, 1 CTA/SM
// Contract  dim 128, heads 1..64, pages and queries aligned to 16 bytes (else, and for MXFP4 keys,
//           sm80_index_logits runs)
// Numerics  products of E4M3 are exact; the matrix unit adds them up with about 14 bits (bound:
//           tests/ops/oracle_index_test.cc). Heads 2t, 2t + 1, 8 + 2t, ... of lane t ascending by
//           fma, lanes (0 + 1) + (2 + 3), times k_scale. Nothing depends on tile, token group or
//           split. NaN stays NaN.
#include <algorithm>

#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "backends/nvidia/ops/index_logits-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

struct Traits {
  static constexpr int kWarpgroups = 3;
  static constexpr int kThreads = kWarpgroups * 128;
  static constexpr int kTile = 64;
  static constexpr int kRows = 2;  // of a lane: g, g + 8
  static constexpr int kSteps = kIndexDim / 32;
  static constexpr int kMultiprocessors = 132;
  static constexpr int kPrefillTokens = 512;  // more tokens than these share keys, most likely
  static constexpr int kFewTokens = 2, kManyTokens = 8;
};

/// Queries of one token: rows of 128 codes, swizzled; dims in the order of the lanes' registers.
struct alignas(1024) Queries {
  uint4 units[kIndexMaxHeads * 8];
};
static_assert(sizeof(Queries) == kIndexMaxHeads * 128, "two tokens are one operand of 128 rows");
struct Token {
  float weights[kIndexMaxHeads];
  int32_t end;
  int32_t unused[3];  // keeps the weights of the next one aligned
};
/// In shared memory: the queries of all tokens of a group, then the rest of them.
struct Group {
  Queries* queries;
  Token* tokens;
};

using Keys = IndexKeys<KvFormat::kIndexFp8, true, Traits::kRows>;

__device__ void load_queries(const IndexLogitsArgs& args, const Group& group, int first,
                             int count) {
  // Unit u of a head, word t: four dims from 64 (u / 4) + 16 t + 4 (u % 4) on.
  for (int i = threadIdx.x; i < count * kIndexMaxHeads * 8; i += Traits::kThreads) {
    const int token = i / (kIndexMaxHeads * 8), head = i / 8 % kIndexMaxHeads, unit = i % 8;
    uint32_t words[4] = {};
    if (head < args.num_heads) {
      const uint16_t* q = args.q + (first + token) * args.q_token_stride +
                          head * args.q_head_stride + unit / 4 * 64 + unit % 4 * 4;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint2 values = __ldg(reinterpret_cast<const uint2*>(q + 16 * t));
        words[t] =
            sm90::e4m3x2(__uint_as_float(values.x << 16), __uint_as_float(values.x & 0xffff0000u)) |
            sm90::e4m3x2(__uint_as_float(values.y << 16), __uint_as_float(values.y & 0xffff0000u))
                << 16;
      }
    }
    group.queries[token].units[head * 8 + (unit ^ (head % 8))] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
  for (int i = threadIdx.x; i < count * kIndexMaxHeads; i += Traits::kThreads) {
    const int token = i / kIndexMaxHeads, head = i % kIndexMaxHeads;
    group.tokens[token].weights[head] =
        head < args.num_heads ? args.weights[(first + token) * args.weights_stride + head] : 0.0f;
    if (head == 0) group.tokens[token].end = min(args.end[first + token], args.max_end);
  }
}

// Products of a tile with the queries of one token (32 sums a lane) or of two neighbours (64).
template <int kSums>
__device__ __forceinline__ void multiply(float (&dots)[kSums], const Keys& keys,
                                         const Queries& queries) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(queries.units));
  sm90::wgmma_fence();
#pragma unroll
  for (int s = 0; s < Traits::kSteps; ++s) {
    const uint32_t a0 = keys.words[0][2 * s], a1 = keys.words[1][2 * s];
    const uint32_t a2 = keys.words[0][2 * s + 1], a3 = keys.words[1][2 * s + 1];
    const uint64_t b = sm90::fp8_operand(address + 32 * s);
    if constexpr (kSums == 32) {
      sm90::wgmma_64x64x32_e4m3(dots, a0, a1, a2, a3, b, s > 0);
    } else {
      sm90::wgmma_64x128x32_e4m3(dots, a0, a1, a2, a3, b, s > 0);
    }
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
}

/// Folds the heads of a tile from sum kFirst on, and writes the scores of rows g (lane t = 0) and g
/// + 8 (t = 1).
template <int kFirst, int kSums>
__device__ __forceinline__ void write_scores(const float (&dots)[kSums], const Token& token,
                                             int32_t row, float scale, float* logits) {
  const int t = threadIdx.x % 4;
  float even = 0, odd = 0;  // rows g, g + 8
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 w = *reinterpret_cast<const float2*>(&token.weights[8 * n + 2 * t]);
    even = __fmaf_rn(w.x, sm80::max_nan(dots[kFirst + 4 * n], 0.0f), even);
    odd = __fmaf_rn(w.x, sm80::max_nan(dots[kFirst + 4 * n + 2], 0.0f), odd);
    even = __fmaf_rn(w.y, sm80::max_nan(dots[kFirst + 4 * n + 1], 0.0f), even);
    odd = __fmaf_rn(w.y, sm80::max_nan(dots[kFirst + 4 * n + 3], 0.0f), odd);
  }
  const bool is_odd = (t & 1) != 0;
  float sum = (is_odd ? odd : even) + __shfl_xor_sync(~0u, is_odd ? even : odd, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (t < 2 && row < token.end) logits[row] = __fmul_rn(sum, scale);
}

/// The same value in all lanes, and known to be: products in flight are not for branches that might
/// split a warp.
__device__ __forceinline__ int32_t uniform(int32_t value) {
  return __shfl_sync(~0u, value, 0);
}

__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_index_logits_fp8(const __grid_constant__ IndexLogitsArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  const Group storage{reinterpret_cast<Queries*>(shared),
                      reinterpret_cast<Token*>(shared + args.group_tokens * sizeof(Queries))};
  const Token* tokens = storage.tokens;
  const int group = static_cast<int>(blockIdx.x) / args.splits;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  const int first = group * args.group_tokens;
  const int count = min(args.group_tokens, args.num_tokens - first);
  const int warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x % 128 / 32;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  load_queries(args, storage, first, count);
  sm90::fence_proxy_async();
  __syncthreads();

  for (int begin = 0, end; begin < count; begin = end) {  // tokens of one sequence
    const int32_t seq = args.token_to_seq[first + begin];
    int32_t longest = 0;
    for (end = begin; end < count && args.token_to_seq[first + end] == seq; ++end) {
      longest = max(longest, tokens[end].end);
    }
    end = uniform(end);
    longest = uniform(longest);
    const int32_t* table = args.table + seq * args.table_stride;
    const int32_t stride = args.splits * Traits::kWarpgroups * Traits::kTile;
    int32_t tile = (split * Traits::kWarpgroups + warpgroup) * Traits::kTile;
    // Everything from here on is in units of this warp's 16 rows.
    const int32_t warp_row = 16 * warp;
    const auto locate = [&](int32_t at, int32_t(&blocks)[Traits::kRows]) {
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        blocks[r] = index_block(args, table, at + warp_row + 8 * r + g, longest);
      }
    };
    // Three sets of registers take turns: a copy would wait for the bytes to arrive.
    Keys ring[3];
    int32_t blocks[Traits::kRows];
    locate(tile, blocks);
    ring[0].load(args, tile + warp_row, blocks);
    locate(tile + stride, blocks);
    ring[1].load(args, tile + stride + warp_row, blocks);
    locate(tile + 2 * stride, blocks);
    // Scores of `keys`, and the tile after the next one into `later`; false at the end.
    const auto step = [&](const Keys& keys, Keys& later) {
      if (tile >= longest) return false;
      later.load(args, tile + 2 * stride + warp_row, blocks);
      locate(tile + 3 * stride, blocks);
      const float scale = __uint_as_float(keys.scale[0]);
      const int32_t row = tile + warp_row + 8 * (t & 1) + g;
      float* logits = args.logits + (first + begin) * args.logits_stride;
      int i = begin;
      for (; i + 1 < end; i += 2, logits += 2 * args.logits_stride) {
        float dots[64];
        multiply(dots, keys, storage.queries[i]);
        write_scores<0>(dots, tokens[i], row, scale, logits);
        write_scores<32>(dots, tokens[i + 1], row, scale, logits + args.logits_stride);
      }
      if (i < end) {
        float dots[32];
        multiply(dots, keys, storage.queries[i]);
        write_scores<0>(dots, tokens[i], row, scale, logits);
      }
      tile += stride;
      return true;
    };
    while (step(ring[0], ring[2]) && step(ring[1], ring[0]) && step(ring[2], ring[1])) {
    }
  }
}

}  // namespace

void index_logits_sm90(const IndexLogitsParams& params, const OpContext& context) {
  if (params.cache.format != KvFormat::kIndexFp8 || !index_rows_aligned(params)) {
    return index_logits_sm80(params, context);
  }
  IndexLogitsArgs args = index_logits_args(params);
  if (context.scratch->measuring() || args.num_tokens == 0 || args.max_end == 0) return;
  const int tokens =
      args.num_tokens > Traits::kPrefillTokens ? Traits::kManyTokens : Traits::kFewTokens;
  args.group_tokens = std::min(args.num_tokens, tokens);
  const int64_t groups = ceil_div(args.num_tokens, args.group_tokens);
  const int64_t most = ceil_div(args.max_end, Traits::kWarpgroups * Traits::kTile);
  args.splits =
      static_cast<int32_t>(std::clamp<int64_t>(Traits::kMultiprocessors / groups, 1, most));
  const int bytes = args.group_tokens * static_cast<int>(sizeof(Queries) + sizeof(Token));
  DSV4_CUDA_CHECK(cudaFuncSetAttribute(sm90_index_logits_fp8,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  sm90_index_logits_fp8<<<static_cast<unsigned>(groups * args.splits), Traits::kThreads, bytes,
                          stream_of(context.stream)>>>(args);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace dsv4::nvidia
