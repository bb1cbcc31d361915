// sm80_index_logits: scores of indexer keys by bf16 matrix instructions, sm_80 and later.
//
// Problem   logits[t,j] = k_scale_j sum_h w[t,h] max(0, q[t,h] . k_j), j < end[t]; up to 64 heads x
//           128 dims; FP8 keys (132 B) or MXFP4 keys (68 B) in pages
// Tiling    CTA = (group of up to 4 tokens, one of `splits` shares of the keys); 4 warps, each with
//           tiles of 32 keys of its own. Queries of the group lie in shared memory; a tile is
//           loaded and converted to bf16 in registers once and multiplied with every token of its
//           sequence, the next tile's bytes are on their way meanwhile. Tokens of a group that
//           belong to different sequences are taken one sequence after the other.
// Budget    per key and token 64 x 128 FMA = 4 x m16n8k16 a key; sm_90 with mma.sync about 280
//           TFMA/s: 29 ns per 1000 keys and token against 32 ns for the 136 B of a key from memory
// Launch    grid (groups * splits), 128 threads, smem = group_tokens * (16 KiB + 256 B)
// Contract  dim 128, heads 1..64; pages and queries aligned to 16 bytes, or the byte-wise variant
// Numerics  keys and queries are exact in bf16, products and sums in f32. Order: 8 steps of 16 dims
//           inside the matrix unit; heads 2t, 2t + 1, 8 + 2t, ... of lane t ascending by fma; lanes
//           (0 + 2) + (1 + 3); times k_scale. Nothing depends on tile, token group or split. NaN
//           stays NaN.
#include <algorithm>

#include "backends/nvidia/ops/gpu_check.h"
#include "backends/nvidia/ops/index_logits-inl.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

struct Traits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kGroupTokens = 4;
  static constexpr int kRows = 4;  // of a lane: g, g + 8, g + 16, g + 24
  static constexpr int kTile = 8 * kRows;
  static constexpr int kSteps = kIndexDim / 16;
};

/// Queries of one token: head h at 16-byte piece 16 h; pieces of a head are ordered as lanes read
/// them, and every second head is turned by 64 bytes so that two heads fill the 32 banks.
struct TokenStorage {
  uint4 q[kIndexMaxHeads * 16];
  float weights[kIndexMaxHeads];
};

__device__ __forceinline__ int q_piece(int head, int t, int piece) {
  return head * 16 + ((piece * 4 + t) ^ ((head & 1) << 2));
}

template <KvFormat kFormat, bool kAligned>
__device__ void load_queries(const IndexLogitsArgs& args, TokenStorage* tokens, int first,
                             int count) {
  for (int i = threadIdx.x; i < count * kIndexMaxHeads * 16; i += Traits::kThreads) {
    const int token = i / (kIndexMaxHeads * 16), head = i / 16 % kIndexMaxHeads, piece = i % 16;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (head < args.num_heads) {
      uint32_t words[4];
      load_words<4, kAligned>(
          words, reinterpret_cast<const std::byte*>(args.q + (first + token) * args.q_token_stride +
                                                    head * args.q_head_stride + piece * 8));
      value = make_uint4(words[0], words[1], words[2], words[3]);
    }
    const bool fp8 = kFormat == KvFormat::kIndexFp8;  // the lane that takes these 8 dims
    const int t = fp8 ? piece % 8 / 2 : piece / 4;
    tokens[token].q[q_piece(head, t, fp8 ? piece / 8 * 2 + piece % 2 : piece % 4)] = value;
  }
  for (int i = threadIdx.x; i < count * kIndexMaxHeads; i += Traits::kThreads) {
    const int token = i / kIndexMaxHeads, head = i % kIndexMaxHeads;
    tokens[token].weights[head] =
        head < args.num_heads ? args.weights[(first + token) * args.weights_stride + head] : 0.0f;
  }
}

// Four E4M3 codes -> two pairs of bf16. The code's exponent and mantissa at bf16's places are the
// value times 2^-120, subnormals included.
__device__ __forceinline__ void expand_fp8(uint32_t codes, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t kTwo120 = 0x7b807b80;
  const uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  even = sm80::multiply_bf16x2((low & 0x80008000u) | ((low >> 4) & 0x07f007f0u), kTwo120);
  odd = sm80::multiply_bf16x2((high & 0x80008000u) | ((high >> 4) & 0x07f007f0u), kTwo120);
}

// Byte kByte of E2M1 pairs -> a pair of bf16, times `scale`. `shifted` = codes << 4. As above: the
// code at bf16's places is the value times 2^-126.
template <int kByte>
__device__ __forceinline__ uint32_t expand_fp4(uint32_t codes, uint32_t shifted, uint32_t scale) {
  constexpr uint32_t kTwo126 = 0x7e807e80;
  const uint32_t pair = __byte_perm(shifted, codes, (4 + kByte) << 12 | kByte << 4);
  const uint32_t value = (pair & 0x80008000u) | ((pair >> 6) & 0x01c001c0u);
  return sm80::multiply_bf16x2(sm80::multiply_bf16x2(value, kTwo126), scale);
}

/// Left operands: [tile of 16 rows][step][register of the instruction].
using Operands = uint32_t[Traits::kRows / 2][Traits::kSteps][4];

template <KvFormat kFormat, bool kAligned>
__device__ __forceinline__ void expand(const IndexKeys<kFormat, kAligned, Traits::kRows>& keys,
                                       Operands& out) {
  constexpr uint32_t kNan = 0x7fc07fc0;
#pragma unroll
  for (int r = 0; r < Traits::kRows; ++r) {
    auto& rows = out[r / 2];
    const int half = r % 2;  // rows g or g + 8 of the tile of 16
    if constexpr (kFormat == KvFormat::kIndexFp8) {
      uint32_t nan = 0;
#pragma unroll
      for (int s = 0; s < Traits::kSteps; ++s) {
        const uint32_t codes = keys.words[r][s];
        nan |= (codes & 0x7f7f7f7fu) + 0x01010101u;
        expand_fp8(codes, rows[s][half], rows[s][half + 2]);
      }
      if ((nan & 0x80808080u) != 0) rows[0][half] = kNan;  // the row's scores are NaN
    } else {
      const uint32_t byte = keys.scale[r];
      const uint32_t scale = byte == 0 ? 0x00400040u : byte == 255 ? kNan : byte << 7 | byte << 23;
#pragma unroll
      for (int s = 0; s < Traits::kSteps; s += 2) {
        const uint32_t codes = keys.words[r][s / 2], shifted = codes << 4;
        rows[s][half] = expand_fp4<0>(codes, shifted, scale);
        rows[s][half + 2] = expand_fp4<1>(codes, shifted, scale);
        rows[s + 1][half] = expand_fp4<2>(codes, shifted, scale);
        rows[s + 1][half + 2] = expand_fp4<3>(codes, shifted, scale);
      }
    }
  }
}

/// The lane's score: row t of its rows, without k_scale.
__device__ __forceinline__ float score(const TokenStorage& token, const Operands& keys,
                                       int head_tiles) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float sums[Traits::kRows] = {};
#pragma unroll 2
  for (int n = 0; n < head_tiles; ++n) {
    float dots[Traits::kRows / 2][4] = {};
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const uint4 q = token.q[q_piece(8 * n + g, t, piece)];
#pragma unroll
      for (int m = 0; m < Traits::kRows / 2; ++m) {
        sm80::mma_bf16(dots[m], keys[m][2 * piece], q.x, q.y);
        sm80::mma_bf16(dots[m], keys[m][2 * piece + 1], q.z, q.w);
      }
    }
    const float2 w = *reinterpret_cast<const float2*>(&token.weights[8 * n + 2 * t]);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const float* dot = &dots[r / 2][r % 2 * 2];
      sums[r] = __fmaf_rn(w.x, sm80::max_nan(dot[0], 0.0f), sums[r]);
      sums[r] = __fmaf_rn(w.y, sm80::max_nan(dot[1], 0.0f), sums[r]);
    }
  }
  return sum_over_lanes(sums);
}

template <KvFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(Traits::kThreads, 3)
    sm80_index_logits(const __grid_constant__ IndexLogitsArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  auto* tokens = reinterpret_cast<TokenStorage*>(shared);
  const int group = static_cast<int>(blockIdx.x) / args.splits;
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  const int first = group * args.group_tokens;
  const int count = min(args.group_tokens, args.num_tokens - first);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int head_tiles = (args.num_heads + 7) / 8;
  load_queries<kFormat, kAligned>(args, tokens, first, count);
  __syncthreads();

  for (int begin = 0, end; begin < count; begin = end) {  // tokens of one sequence
    const int32_t seq = args.token_to_seq[first + begin];
    int32_t longest = 0;
    for (end = begin; end < count && args.token_to_seq[first + end] == seq; ++end) {
      longest = max(longest, args.end[first + end]);
    }
    longest = min(longest, args.max_end);
    const int32_t* table = args.table + seq * args.table_stride;
    const int32_t stride = args.splits * Traits::kWarps * Traits::kTile;
    int32_t tile = (split * Traits::kWarps + warp) * Traits::kTile;
    const auto locate = [&](int32_t at, int32_t(&blocks)[Traits::kRows]) {
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        blocks[r] = index_block(args, table, at + 8 * r + g, longest);
      }
    };
    IndexKeys<kFormat, kAligned, Traits::kRows> keys;
    int32_t blocks[Traits::kRows];
    locate(tile, blocks);
    keys.load(args, tile, blocks);
    locate(tile + stride, blocks);
    for (; tile < longest; tile += stride) {
      Operands operands;
      expand(keys, operands);
      const float scale = kFormat == KvFormat::kIndexFp8 ? __uint_as_float(keys.scale[0]) : 1.0f;
      keys.load(args, tile + stride, blocks);
      locate(tile + 2 * stride, blocks);
      const int32_t entry = tile + 8 * t + g;
      for (int i = begin; i < end; ++i) {
        const int32_t visible = min(args.end[first + i], args.max_end);
        if (tile >= visible) continue;
        const float sum = score(tokens[i], operands, head_tiles);
        if (entry < visible) {
          args.logits[(first + i) * args.logits_stride + entry] = __fmul_rn(sum, scale);
        }
      }
    }
  }
}

template <KvFormat kFormat, bool kAligned>
void launch(const IndexLogitsArgs& args, cudaStream_t stream) {
  const auto kernel = sm80_index_logits<kFormat, kAligned>;
  const int bytes = args.group_tokens * static_cast<int>(sizeof(TokenStorage));
  DSV4_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t groups = ceil_div(args.num_tokens, args.group_tokens);
  kernel<<<static_cast<unsigned>(groups * args.splits), Traits::kThreads, bytes, stream>>>(args);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace

void index_logits_sm80(const IndexLogitsParams& given, const OpContext& context) {
  const Bf16Queries queries(given, context);
  const IndexLogitsParams& params = queries.params();
  IndexLogitsArgs args = index_logits_args(params);
  if (context.scratch->measuring() || args.num_tokens == 0 || args.max_end == 0) return;
  // Enough CTAs to fill a large chip a few times over, none below two tiles for each warp.
  constexpr int64_t kWantedCtas = 132 * 12;
  args.group_tokens = std::min(args.num_tokens, Traits::kGroupTokens);
  const int64_t groups = ceil_div(args.num_tokens, args.group_tokens);
  const int64_t most = ceil_div(args.max_end, 2 * Traits::kWarps * Traits::kTile);
  args.splits = static_cast<int32_t>(std::clamp<int64_t>(kWantedCtas / groups, 1, most));
  const bool aligned = index_rows_aligned(params);
  const cudaStream_t stream = stream_of(context.stream);
  if (params.cache.format == KvFormat::kIndexFp8) {
    aligned ? launch<KvFormat::kIndexFp8, true>(args, stream)
            : launch<KvFormat::kIndexFp8, false>(args, stream);
  } else {
    aligned ? launch<KvFormat::kIndexMxfp4, true>(args, stream)
            : launch<KvFormat::kIndexMxfp4, false>(args, stream);
  }
}

}  // namespace dsv4::nvidia
