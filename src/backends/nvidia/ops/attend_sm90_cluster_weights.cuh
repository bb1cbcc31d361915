// Weights P in sm90_attend_cluster: where they lie, and how they come to the other CTAs.
#pragma once
#include "backends/nvidia/ops/attend_sm90_cluster_loader.cuh"

namespace dsv4::nvidia::sm90_attend {

/// Where the weights of a block lie. Where fewer warps have heads, there is room for more blocks,
/// so that no CTA waits for the output roles of others.
template <typename Traits>
struct WeightSlots {
  static_assert(!Traits::kSharesHeads || 2 * Traits::kWeightSlots >= Traits::kCtas);
  bool all_ctas = false;  // a block of every CTA
  int warps = 4;

  __device__ __forceinline__ static WeightSlots of(const AttendSm90Args& args) {
    if (!Traits::kSharesHeads) return {};
    return {args.log2_shares > 0, 4 >> args.log2_shares};
  }
  __device__ __forceinline__ int count() const {
    return all_ctas ? Traits::kCtas : Traits::kWeightSlots;
  }
  __device__ __forceinline__ int slot(int block) const {
    return all_ctas ? block % Traits::kCtas : block % Traits::kWeightSlots;
  }
  __device__ __forceinline__ int place(int slot, int warp) const {
    return slot * warps + (warp & (warps - 1));
  }
};

/// Where in global memory a warp of this CTA puts the weights of a block for its cluster. Two
/// rounds take turns: a CTA that has found a free slot for a block knows that all CTAs have the one
/// before, and the next block after it may overwrite that.
__device__ __forceinline__ BlockWeights* sent_weights(const AttendSm90Args& args, int parity,
                                                      int warp) {
  static_assert(2 * 4 * sizeof(BlockWeights) == kClusterWeightBytes);
  return reinterpret_cast<BlockWeights*>(args.weights) + blockIdx.x * 8 + parity * 4 + warp;
}
__device__ __forceinline__ void store_sent_weights(BlockWeights* to, const uint32_t (&p)[16],
                                                   const float (&sum)[2],
                                                   const float (&reference)[2], int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    __stcg(&to->p[k][lane], make_uint4(p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]));
  }
  __stcg(&to->sums[lane], make_float2(sum[0], sum[1]));
  if ((lane & 3) == 0) {
    __stcg(&to->reference[lane >> 2], make_float2(reference[0], reference[1]));
  }
  fence_proxy_async_global();
  __syncwarp();
}

/// Without the L2: weights of 16 heads from this CTA's slot to those of the others. By one warp.
template <typename Traits>
__device__ __forceinline__ void send_weights(const ClusterStorage<Traits>& shared, uint32_t base,
                                             int rank, int place, int lane) {
  // Each CTA begins with another one, so that they do not all wait for the same.
  if (lane > 0 && lane < Traits::kCtas) {
    const int to = (rank + lane) % Traits::kCtas;
    const uint32_t weights = member_address(base, shared, &shared.weights[place]);
    const uint32_t full = member_address(base, shared, &shared.weights_full[place]);
    cluster_copy_async(cluster_address(weights, to), weights, sizeof(BlockWeights),
                       cluster_address(full, to));
  }
  __syncwarp();
}

}  // namespace dsv4::nvidia::sm90_attend
