// Host side of sm90_attend_heads, and the kernel that merges the chains of long lists.
#include "backends/nvidia/ops/attend_sm90_heads.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_heads_traits.h"
#include "backends/nvidia/ops/launch.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kMergeThreads = 128;
constexpr int kAtOnce = 4;  // results that a thread asks for together

/// Results merged so far: two heads, two dims (x and z, y and w).
struct MergedValues {
  float2 sums[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};  // maximum, sum
  float4 values = {};

  __device__ __forceinline__ void merge(const float2 (&more)[2], float4 more_values) {
    const MergeWeights first = merge_sums(sums[0], more[0]);
    const MergeWeights second = merge_sums(sums[1], more[1]);
    values.x = merge_values(values.x, more_values.x, first.by_total, first.by_chain);
    values.y = merge_values(values.y, more_values.y, second.by_total, second.by_chain);
    values.z = merge_values(values.z, more_values.z, first.by_total, first.by_chain);
    values.w = merge_values(values.w, more_values.w, second.by_total, second.by_chain);
  }
};

// sm90_merge_heads: the chains of one token, in ascending order, parts before them; the same bits
// as sm90_merge_chains.
//
// Tiling    CTA = (token, 8 heads of 64 dims), threads hold values as those of the output role of
//           sm90_attend_heads do
// Contract  tokens with one chain are left alone
template <int kTileHeads>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ AttendSm90Args args, int fp8_panels) {
  follow_kernels_before();
  const AttendArgs& attend = args.attend;
  constexpr int kGroups = kTileHeads / 8;
  const int token = static_cast<int>(blockIdx.x), vector = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int panel = vector / kGroups, head0 = vector % kGroups * 8 + 2 * (lane & 3);
  const TokenBlocks blocks = token_blocks<64>(attend, token);
  if (blocks.num_chains == 1) return;

  MergedValues total, chain;
#pragma unroll 1
  for (int first = 0; first < blocks.num_chains; first += kAtOnce) {
    float4 sums[kAtOnce], values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int result = first + i;
      const bool exists = result < blocks.num_chains &&
                          (result == 0 || chain_blocks(attend, blocks, result).count > 0);
      const int64_t slot = static_cast<int64_t>(token) * attend.max_chains + result;
      const auto* of_heads = reinterpret_cast<const float4*>(args.chains.sums + slot * kTileHeads);
      const float4* of_item = args.chains.values + (slot * kTileHeads + vector) * kMergeThreads;
      sums[i] = exists ? __ldcg(of_heads + head0 / 2) : make_float4(-INFINITY, 0.f, -INFINITY, 0.f);
      values[i] = exists ? __ldcg(of_item + thread) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int result = first + i;
      if (result >= blocks.num_chains) break;
      chain.merge({{sums[i].x, sums[i].y}, {sums[i].z, sums[i].w}}, values[i]);
      if ((result + 1) % args.results_per_chain == 0 || result + 1 == blocks.num_chains) {
        total.merge(chain.sums, chain.values);
        chain = {};
      }
    }
  }
  float factors[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = head0 + h;
    if (head >= attend.num_heads) continue;
    const float max = total.sums[h].x, sum = total.sums[h].y;
    const bool any = sum != 0.f;
    const float sink = attend.sink != nullptr ? __ldg(attend.sink + head) : -INFINITY;
    if (any) factors[h] = inverse_denominator(max, sum, sink);
    if (panel == 0 && thread < 4 && attend.lse != nullptr) {
      attend.lse[static_cast<int64_t>(token) * attend.num_heads + head] =
          any ? log_sum_exp(max, sum) : -INFINITY;
    }
  }
  // Two lanes, rows r and r + 1 of O^T: one takes both rows of the first head, one of the second.
  float4 values = total.values;
  values = {values.x * factors[0], values.y * factors[1], values.z * factors[0],
            values.w * factors[1]};
  const bool odd = (lane & 4) != 0;
  const float low = __shfl_xor_sync(~0u, odd ? values.x : values.y, 4);
  const float high = __shfl_xor_sync(~0u, odd ? values.z : values.w, 4);
  const int head = head0 + (odd ? 1 : 0);
  if (head >= attend.num_heads) return;
  uint16_t* out = attend.out + token * attend.out_token_stride + head * attend.out_head_stride +
                  panel * 64 + warp * 16;
  const __nv_bfloat162 pairs[2] = {
      odd ? __floats2bfloat162_rn(low, values.y) : __floats2bfloat162_rn(values.x, low),
      odd ? __floats2bfloat162_rn(high, values.w) : __floats2bfloat162_rn(values.z, high)};
  const int row = lane >> 3 << 1;
  const bool wide = panel >= fp8_panels;  // columns of a step are those of RowsOfWarp
  auto* to = reinterpret_cast<__nv_bfloat162*>(out + (wide ? row : 2 * row));
  to[0] = pairs[0];
  to[wide ? 4 : 1] = pairs[1];
}

template <int kTileHeads>
void launch_merge(const AttendSm90Args& args, KvFormat format, cudaStream_t stream) {
  const int fp8_panels = format == KvFormat::kBf16 ? 0 : format == KvFormat::kFp8DsMla ? 7 : 8;
  launch<merge_kernel<kTileHeads>>(
      {dim3(static_cast<unsigned>(args.attend.num_tokens), kTileHeads), kMergeThreads}, stream,
      args, fp8_panels);
}

int64_t unfinished_bytes(int tile) {
  return static_cast<int64_t>(tile == 16 ? sizeof(UnfinishedItem<16>) : sizeof(UnfinishedItem<32>));
}

}  // namespace

int64_t attend_sm90_heads_hand_over_bytes(const AttendArgs& args, int64_t num_items) {
  // That costs a microsecond, in which the numbers of all items are read and added up, and what a
  // cut costs: too much for windows alone, or where multiprocessors are idle for less than 6% of a
  // call.
  if (args.max_blocks == 0) return 0;
  const int num_ctas = num_multiprocessors();
  const int64_t idle = round_up(num_items, int64_t{num_ctas}) - num_items;
  // A device with more multiprocessors than scratch has room for deals out items.
  const bool deals = num_ctas <= kMaxPersistentCtas && num_items > num_ctas &&
                     num_items <= sm90_attend_heads::kMaxDealtItems && idle * 16 > num_items;
  return deals ? num_ctas * unfinished_bytes(attend_sm90_heads_tile(args)) : 0;
}

int64_t attend_sm90_heads_max_hand_over_bytes() {
  return kMaxPersistentCtas * unfinished_bytes(32);
}

int attend_sm90_heads_tile(const AttendArgs& args) {
  if (args.num_heads > 32 || !is_aligned_16(args)) return 0;
  if (args.num_heads <= 16) return 16;
  // Of bf16 rows, shared memory has room for a quarter of a block under way: 42 us where the kernel
  // of 64 heads takes 35 (128 + 512 rows, 128 tokens).
  const bool bf16 =
      args.window.format == KvFormat::kBf16 || args.compressed.format == KvFormat::kBf16;
  return bf16 ? 0 : 32;
}

void attend_sm90_heads(const AttendSm90Args& args, KvFormat format, std::byte* unfinished,
                       cudaStream_t stream) {
  const int tile = attend_sm90_heads_tile(args.attend);
  const int grid = std::min(args.num_items, num_multiprocessors());
  HandOvers hand_overs;
  if (unfinished != nullptr && attend_sm90_heads_hand_over_bytes(args.attend, args.num_items) > 0) {
    hand_overs = {unfinished, next_mark()};
  }
  switch (format) {
    case KvFormat::kFp8DsMla:
      tile == 16
          ? launch_attend_sm90_heads<KvFormat::kFp8DsMla, 16>(args, hand_overs, grid, stream)
          : launch_attend_sm90_heads<KvFormat::kFp8DsMla, 32>(args, hand_overs, grid, stream);
      break;
    case KvFormat::kBf16:
      launch_attend_sm90_heads<KvFormat::kBf16, 16>(args, hand_overs, grid, stream);
      break;
    default:
      tile == 16 ? launch_attend_sm90_heads<KvFormat::kFp8, 16>(args, hand_overs, grid, stream)
                 : launch_attend_sm90_heads<KvFormat::kFp8, 32>(args, hand_overs, grid, stream);
      break;
  }
  if (args.attend.max_chains > 1) {
    tile == 16 ? launch_merge<16>(args, format, stream) : launch_merge<32>(args, format, stream);
  }
}

}  // namespace dsv4::nvidia
