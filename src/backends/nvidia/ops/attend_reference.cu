// attend_reference: one warp per token and head, one row after another, f32 FMA.
//
// Problem   attend.h
// Tiling    lane l owns head dims l, l + 32, ...; a block's scores are kept by lane (row % 32)
// Launch    grid tokens x heads, 32 threads
// Contract  any head_dim that is a multiple of 64 up to 512, any row alignment, blocks of up to 64
//           rows; masked rows are never read; no scratch
// Numerics  f32 throughout, row values rounded to bf16 as their readers do, p rounded to bf16 for
//           the values where asked, sums of p unrounded
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/gpu_check.h"

namespace dsv4::nvidia {
namespace {

constexpr int kMaxDimsPerLane = 16;
constexpr int kMaxRows = 64;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ float bf16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ uint16_t float_to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
__device__ float e4m3_to_float(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return NAN;
  const float magnitude = __uint_as_float(static_cast<uint32_t>(code & 0x7f) << 20) * 0x1p120f;
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}
__device__ float ue8m0_to_float(uint8_t code) {
  if (code == 255) return NAN;
  return __uint_as_float(code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23);
}

__device__ float row_value(const RowSource& rows, RowRef row, int dim) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(row.values);
  constexpr int kNope = 448, kTile = 64;  // fp8_ds_mla
  switch (rows.format) {
    case KvFormat::kBf16:
      return bf16_to_float(reinterpret_cast<const uint16_t*>(bytes)[dim]);
    case KvFormat::kFp8:
      return e4m3_to_float(bytes[dim]);
    default:
      if (dim >= kNope) {
        return bf16_to_float(reinterpret_cast<const uint16_t*>(bytes + kNope)[dim - kNope]);
      }
      return bf16_to_float(
          float_to_bf16(e4m3_to_float(bytes[dim]) *
                        ue8m0_to_float(reinterpret_cast<const uint8_t*>(row.scales)[dim / kTile])));
  }
}

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

struct Partial {
  float max, sum;
  bool seen;
  float o[kMaxDimsPerLane];
};

// One block of a chain: online softmax over its unmasked rows.
__device__ void attend_block(const AttendArgs& args, const TokenBlocks& blocks,
                             const ChainBlocks& chain, int token, int block, const float* q,
                             Partial& out) {
  const int lane = static_cast<int>(threadIdx.x), dims = args.head_dim / 32;
  const RowSource& source = source_of_chain(args, chain, block);
  const auto row_at = [&](int r) {
    return row_address(source, slot_of_chain(args, blocks, chain, token, block, r));
  };
  float z[kMaxRows / 32] = {-INFINITY, -INFINITY}, max = out.max;
  bool active[kMaxRows / 32] = {false, false};
  for (int r = 0; r < args.rows_per_block; ++r) {
    const RowRef row = row_at(r);
    if (row.values == nullptr) continue;
    float dot = 0;
    for (int i = 0; i < dims; ++i) {
      dot = __fmaf_rn(q[i], row_value(source, row, lane + 32 * i), dot);
    }
    const float score = __fmul_rn(warp_sum(dot), args.scale_log2);
    max = fmaxf(max, score);
    if (r % 32 == lane) {
      z[r / 32] = score;
      active[r / 32] = true;
    }
  }
  if (__ballot_sync(kAllLanes, active[0] || active[1]) == 0) return;
  const float alpha = out.seen ? exp2f(out.max - max) : 0.0f;
  out.max = max;
  out.seen = true;
  float p[kMaxRows / 32];
  for (int i = 0; i < kMaxRows / 32; ++i) p[i] = active[i] ? exp2f(z[i] - max) : 0.0f;
  out.sum = __fmaf_rn(out.sum, alpha, warp_sum(p[0] + p[1]));
  for (int i = 0; i < dims; ++i) out.o[i] = __fmul_rn(out.o[i], alpha);
  for (int r = 0; r < args.rows_per_block; ++r) {
    const RowRef row = row_at(r);
    if (row.values == nullptr) continue;
    float weight = __shfl_sync(kAllLanes, p[r / 32], r % 32);
    if (args.round_p) weight = bf16_to_float(float_to_bf16(weight));
    for (int i = 0; i < dims; ++i) {
      out.o[i] = __fmaf_rn(weight, row_value(source, row, lane + 32 * i), out.o[i]);
    }
  }
}

__global__ void __launch_bounds__(32) reference_kernel(const __grid_constant__ AttendArgs args) {
  const int lane = static_cast<int>(threadIdx.x), dims = args.head_dim / 32;
  const int token = static_cast<int>(blockIdx.x) / args.num_heads;
  const int head = static_cast<int>(blockIdx.x) % args.num_heads;
  float q[kMaxDimsPerLane];
  for (int i = 0; i < dims; ++i) {
    q[i] = bf16_to_float(
        args.q[token * args.q_token_stride + head * args.q_head_stride + lane + 32 * i]);
  }
  const TokenBlocks blocks = token_blocks(args, token);
  Partial total{-INFINITY, 0, false, {}};
  for (int c = 0; c < blocks.num_chains; ++c) {
    const ChainBlocks chain = chain_blocks(args, blocks, c);
    Partial part{-INFINITY, 0, false, {}};
    for (int b = 0; b < chain.count; ++b) attend_block(args, blocks, chain, token, b, q, part);
    if (!part.seen) continue;
    if (!total.seen) {
      total = part;
      continue;
    }
    const MergeWeights w = merge_chains(total.max, total.sum, part.max, part.sum);
    for (int i = 0; i < dims; ++i) {
      total.o[i] = merge_values(total.o[i], part.o[i], w.by_total, w.by_chain);
    }
    total.max = w.max;
    total.sum = w.sum;
  }
  const float sink = args.sink == nullptr ? -INFINITY : args.sink[head];
  const float factor = total.seen ? inverse_denominator(total.max, total.sum, sink) : 0.0f;
  uint16_t* out = args.out + token * args.out_token_stride + head * args.out_head_stride;
  for (int i = 0; i < dims; ++i) {
    out[lane + 32 * i] = total.seen ? float_to_bf16(__fmul_rn(total.o[i], factor)) : 0;
  }
  if (args.lse != nullptr && lane == 0) {
    args.lse[int64_t{token} * args.num_heads + head] =
        total.seen ? log_sum_exp(total.max, total.sum) : -INFINITY;
  }
  if (args.max_logits != nullptr && lane == 0) {
    args.max_logits[int64_t{token} * args.num_heads + head] =
        total.seen ? natural_max(total.max) : -INFINITY;
  }
}

}  // namespace

void attend_reference(const AttendParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const AttendArgs args = attend_args(params);
  DSV4_CHECK(args.head_dim % 64 == 0 && args.head_dim <= 32 * kMaxDimsPerLane);
  if (args.num_tokens == 0) return;
  const int64_t warps = int64_t{args.num_tokens} * args.num_heads;
  DSV4_CHECK(warps <= INT32_MAX);
  reference_kernel<<<static_cast<unsigned>(warps), 32, 0, stream_of(context.stream)>>>(args);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace dsv4::nvidia
