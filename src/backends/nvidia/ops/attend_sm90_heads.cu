// Host side of sm90_attend_heads, and the kernel that merges the chains of long lists.
#include "backends/nvidia/ops/attend_sm90_heads.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <atomic>

#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_heads_traits.h"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia {
namespace {

constexpr int kHeadDim = 512;
constexpr int kMergeThreads = kHeadDim / 4;
constexpr int kAtOnce = 4;  // results that a thread asks for together

/// Results merged so far: 4 dims of a head.
struct MergedValues {
  float2 sums = {-INFINITY, 0.f};  // maximum, sum
  float4 values = {};

  __device__ __forceinline__ void merge(float2 more, float4 more_values) {
    const MergeWeights by = merge_sums(sums, more);
    values.x = merge_values(values.x, more_values.x, by.by_total, by.by_chain);
    values.y = merge_values(values.y, more_values.y, by.by_total, by.by_chain);
    values.z = merge_values(values.z, more_values.z, by.by_total, by.by_chain);
    values.w = merge_values(values.w, more_values.w, by.by_total, by.by_chain);
  }
};

// sm90_merge_heads: the chains of one token and head, in ascending order, parts before them; the
// same bits as sm90_merge_chains.
//
// Tiling    CTA = (token, head), a thread 4 dims
// Contract  tokens with one chain are left alone
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ AttendSm90Args args, int tile_heads) {
  follow_kernels_before();
  const AttendArgs& attend = args.attend;
  const int token = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const TokenBlocks blocks = token_blocks(attend, token);
  if (blocks.num_chains == 1) return;

  MergedValues total, chain;
#pragma unroll 1
  for (int first = 0; first < blocks.num_chains; first += kAtOnce) {
    float2 sums[kAtOnce];
    float4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int result = first + i;
      const bool exists = result < blocks.num_chains &&
                          (result == 0 || chain_blocks(attend, blocks, result).count > 0);
      const int64_t slot = static_cast<int64_t>(token) * attend.max_chains + result;
      const int64_t at = slot * tile_heads + head;
      sums[i] = exists ? __ldcg(args.chains.sums + at) : make_float2(-INFINITY, 0.f);
      values[i] = exists ? __ldcg(args.chains.values + at * kHeadDim / 4 + thread) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int result = first + i;
      if (result >= blocks.num_chains) break;
      chain.merge(sums[i], values[i]);
      if ((result + 1) % args.results_per_chain == 0 || result + 1 == blocks.num_chains) {
        total.merge(chain.sums, chain.values);
        chain = {};
      }
    }
  }
  const float max = total.sums.x, sum = total.sums.y;
  const bool any = sum != 0.f;
  const float4 values = total.values;

  const float sink = attend.sink != nullptr ? __ldg(attend.sink + head) : -INFINITY;
  const float factor = any ? inverse_denominator(max, sum, sink) : 0.f;
  auto* out = reinterpret_cast<__nv_bfloat162*>(attend.out + token * attend.out_token_stride +
                                                head * attend.out_head_stride + 4 * thread);
  out[0] = __floats2bfloat162_rn(values.x * factor, values.y * factor);
  out[1] = __floats2bfloat162_rn(values.z * factor, values.w * factor);
  if (thread == 0 && attend.lse != nullptr) {
    attend.lse[static_cast<int64_t>(token) * attend.num_heads + head] =
        any ? log_sum_exp(max, sum) : -INFINITY;
  }
}

int64_t unfinished_bytes(int tile) {
  return static_cast<int64_t>(tile == 16 ? sizeof(UnfinishedItem<16>) : sizeof(UnfinishedItem<32>));
}

/// A number of 64 bits that no launch had before and that memory does not hold by chance: the
/// finaliser of splitmix64, which maps no two numbers to one, nor any but 0 to 0.
uint64_t next_mark() {
  static std::atomic<uint64_t> launches{0};
  uint64_t x = launches.fetch_add(1, std::memory_order_relaxed) + 1;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

}  // namespace

int64_t attend_sm90_heads_hand_over_bytes(int64_t num_items, int tile) {
  const int num_ctas = num_multiprocessors();
  const bool deals = num_items > num_ctas && num_items <= sm90_attend_heads::kMaxDealtItems;
  return deals ? num_ctas * unfinished_bytes(tile) : 0;
}

int64_t attend_sm90_heads_max_hand_over_bytes(int num_ctas) {
  return num_ctas * unfinished_bytes(32);
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
  if (unfinished != nullptr && attend_sm90_heads_hand_over_bytes(args.num_items, tile) > 0) {
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
    const dim3 blocks(static_cast<unsigned>(args.attend.num_tokens),
                      static_cast<unsigned>(args.attend.num_heads));
    launch<merge_kernel>({blocks, kMergeThreads}, stream, args, tile);
  }
}

}  // namespace dsv4::nvidia
