// top_k on sm_90: a cluster of CTAs shares a row. See top_k-inl.h.
#include <algorithm>

#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/top_k-inl.h"

namespace dsv4::nvidia {
namespace {

struct ClusterTeam {
  static constexpr bool kSingle = false;
  __device__ uint32_t rank() const { return sm90::cluster_rank(); }
  __device__ uint32_t size() const { return sm90::cluster_size(); }
  __device__ void arrive() const { sm90::cluster_arrive(); }
  __device__ void wait() const { sm90::cluster_wait(); }
  __device__ void add(uint32_t* local, uint32_t value) const {
    sm90::cluster_add(sm90::cluster_address(local, 0), value);
  }
  __device__ void store(uint2* local, uint2 value) const {
    sm90::cluster_store(sm90::cluster_address(local, 0), value);
  }
};

__global__ void __launch_bounds__(TopKTraits::kThreads, 2)
    sm90_top_k(const __grid_constant__ TopKArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  auto& storage = *reinterpret_cast<TopKStorage<false>*>(shared);
  const ClusterTeam team;
  prepare_top_k(storage, team);
  follow_kernels_before();
  top_k_row(storage, args, blockIdx.x / team.size(), team);
}

// CTAs that share a row: as many as there are multiprocessors, none for less than 4096 scores.
int team_size(int64_t tokens, int64_t width) {
  constexpr int64_t kMinPart = 4096;
  const int64_t multiprocessors = num_multiprocessors();
  int size = 1;
  while (size < kTopKMaxTeam && tokens * size * 2 <= multiprocessors &&
         width >= kMinPart * size * 2) {
    size *= 2;
  }
  return size;
}

}  // namespace

void top_k_sm90(const TopKParams& params, const OpContext& context) {
  const int64_t tokens = params.logits.shape[0];
  const int size = team_size(tokens, params.logits.shape[1]);
  if (size == 1) return top_k_sm80(params, context);
  if (context.scratch->measuring() || tokens == 0 || params.topk_indices.shape[1] == 0) return;
  launch<sm90_top_k>({dim3(static_cast<unsigned>(tokens * size)), TopKTraits::kThreads,
                      sizeof(TopKStorage<false>), static_cast<unsigned>(size)},
                     stream_of(context.stream), top_k_args(params));
}

}  // namespace dsv4::nvidia
