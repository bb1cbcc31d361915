// sm90_merge_chains: the chains of one token and 64 heads, in ascending order; where results are
// those of parts, `results_per_chain` of them make a chain first.
//
// Problem   a result is a maximum, a sum and 512 values of every head (ChainResults); merge_chains
//           (attend_rows.cuh) one by one, then out = values / denominator
// Tiling    CTA = (token, tile, one of kSlices slices of the values), 256 threads. They hold values
//           as those of the two output roles of sm90_attend do: thread, vector v -> heads row and
//           row + 8, dims 128 (thread / 128) ... (8 v + 2 (thread % 4)) of a half. Of kBatch
//           results the first 64 threads find the weights, of a head each, while values are on
//           their way to all
// Budget    64 x 512 values of a result, from the L2
// Launch    (tokens x tiles, kSlices) CTAs
// Contract  tokens with one chain are left alone. Numbers of tokens and sinks do not stem from the
//           kernel before; who wrote them had ended when that one let this one start, because it
//           waits first (follow_kernels_before), so that they are read before it ends
// Numerics  f32; the same order of operations whatever the slices
#include <cuda_bf16.h>

#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia {
namespace {

constexpr int kTileHeads = 64;
constexpr int kHeadDim = 512;
constexpr int kThreads = 256;                                    // of the two output roles
constexpr int kThreadVectors = kTileHeads * kHeadDim / 4 / 256;  // float4 of a thread
constexpr int kBatch = 8;                                        // results

/// Weights of values so far and of a result, of a chain so far and of a chain that it ends.
struct ResultWeights {
  float2 in_chain[kBatch][kTileHeads];
  float2 in_total[kBatch][kTileHeads];
};

/// Two values each of two heads.
__device__ __forceinline__ void merge_four(float4& total, const float4& more, const float2& first,
                                           const float2& second) {
  total.x = merge_values(total.x, more.x, first.x, first.y);
  total.y = merge_values(total.y, more.y, first.x, first.y);
  total.z = merge_values(total.z, more.z, second.x, second.y);
  total.w = merge_values(total.w, more.w, second.x, second.y);
}

template <int kSlices>
__global__ void __launch_bounds__(kThreads, 2)
    merge_chains_kernel(const __grid_constant__ AttendSm90Args args) {
  constexpr int kVectors = kThreadVectors / kSlices;
  constexpr int kAtOnce = 8 / kVectors;  // results whose values a thread asks for together
  static_assert(kBatch % kAtOnce == 0);
  __shared__ ResultWeights weights;
  __shared__ float factors[kTileHeads];
  const AttendArgs& attend = args.attend;
  const int tile_index = static_cast<int>(blockIdx.x), token = tile_index >> args.log2_tiles;
  const int first_head = (tile_index - (token << args.log2_tiles)) * kTileHeads;
  const int thread = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.y) * kVectors;
  const int row = (thread >> 5 & 3) * 16 + (thread & 31) / 4;
  const int own_head = first_head + thread;  // of which this thread finds weights
  const bool finds_weights = thread < kTileHeads;
  const TokenBlocks blocks = token_blocks(attend, token);
  const int num_results = blocks.num_chains;
  // Of chains before the first row only the first one has a result.
  const int first_result = blocks.compressed_first / attend.blocks_per_chain;
  const auto exists = [&](int result) {
    return result < num_results && (result == 0 || result >= first_result);
  };
  float sink = -INFINITY;
  if (finds_weights && attend.sink != nullptr && own_head < attend.num_heads) {
    sink = __ldg(attend.sink + own_head);
  }
  follow_kernels_before();
  if (num_results == 1) return;

  const int64_t slot = static_cast<int64_t>(tile_index) * attend.max_chains;
  const float2* sums = args.chains.sums + slot * kTileHeads + thread;
  const float4* results = args.chains.values + (slot * kThreadVectors + first) * kThreads + thread;
  float2 total_sums = {-INFINITY, 0.f}, chain_sums = {-INFINITY, 0.f};  // maximum, sum
  float4 total[kVectors] = {}, chain[kVectors] = {};
  int in_chain = 0;  // results of the chain so far, for weights and for values
  int values_in_chain = 0;
#pragma unroll 1
  for (int batch = 0; batch < num_results; batch += kBatch) {
    float2 of_result[kBatch];  // first, as all wait for the weights
    if (finds_weights) {
#pragma unroll
      for (int c = 0; c < kBatch; ++c) {
        of_result[c] = exists(batch + c) ? __ldcg(sums + (batch + c) * kTileHeads)
                                         : make_float2(-INFINITY, 0.f);
      }
    }
    float4 values[kAtOnce][kVectors];
    const auto ask_for_values = [&](int result0) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const float4* from = results + int64_t{result0 + c} * (kThreadVectors * kThreads);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          values[c][v] = exists(result0 + c) ? __ldcg(from + v * kThreads) : float4{};
        }
      }
    };
    ask_for_values(batch);
    if (finds_weights) {
#pragma unroll
      for (int c = 0; c < kBatch; ++c) {
        if (batch + c >= num_results) break;
        const MergeWeights merged = merge_sums(chain_sums, of_result[c]);
        weights.in_chain[c][thread] = make_float2(merged.by_total, merged.by_chain);
        if (++in_chain == args.results_per_chain || batch + c + 1 == num_results) {
          const MergeWeights ended = merge_sums(total_sums, chain_sums);
          weights.in_total[c][thread] = make_float2(ended.by_total, ended.by_chain);
          chain_sums = make_float2(-INFINITY, 0.f);
          in_chain = 0;
        }
      }
    }
    __syncthreads();
    const int end = min(batch + kBatch, num_results);
#pragma unroll 1
    for (int result0 = batch; result0 < end; result0 += kAtOnce) {
      if (result0 > batch) ask_for_values(result0);
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const int result = result0 + c;
        if (result >= end) break;
        const int at = result - batch;
        const float2 low = weights.in_chain[at][row], high = weights.in_chain[at][row + 8];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) merge_four(chain[v], values[c][v], low, high);
        if (++values_in_chain == args.results_per_chain || result + 1 == num_results) {
          const float2 low = weights.in_total[at][row], high = weights.in_total[at][row + 8];
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            merge_four(total[v], chain[v], low, high);
            chain[v] = make_float4(0.f, 0.f, 0.f, 0.f);
          }
          values_in_chain = 0;
        }
      }
    }
    __syncthreads();
  }

  if (finds_weights) {
    const bool any = total_sums.y != 0.f;
    factors[thread] = any ? inverse_denominator(total_sums.x, total_sums.y, sink) : 0.f;
    if (blockIdx.y == 0 && attend.lse != nullptr && own_head < attend.num_heads) {
      attend.lse[static_cast<int64_t>(token) * attend.num_heads + own_head] =
          any ? log_sum_exp(total_sums.x, total_sums.y) : -INFINITY;
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = first_head + row + 8 * h;
    if (head >= attend.num_heads) continue;
    const float inverse = factors[row + 8 * h];
    uint16_t* out = attend.out + token * attend.out_token_stride + head * attend.out_head_stride +
                    (thread >> 7) * 256 + (thread & 3) * 2;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 of = total[v];
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn((h == 0 ? of.x : of.z) * inverse, (h == 0 ? of.y : of.w) * inverse);
      *reinterpret_cast<__nv_bfloat162*>(out + (first + v) * 8) = pair;
    }
  }
}

}  // namespace

void merge_chains_sm90(const AttendSm90Args& args, cudaStream_t stream) {
  // Finer where that fills multiprocessors that had nothing to do.
  constexpr int kManySlices = 32, kSlices = 8;
  const auto tiles = static_cast<unsigned>(args.attend.num_tokens << args.log2_tiles);
  if (static_cast<int>(tiles) * kSlices < num_multiprocessors()) {
    launch<merge_chains_kernel<kManySlices>>({dim3(tiles, kManySlices), kThreads}, stream, args);
  } else {
    launch<merge_chains_kernel<kSlices>>({dim3(tiles, kSlices), kThreads}, stream, args);
  }
}

}  // namespace dsv4::nvidia
