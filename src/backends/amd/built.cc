// The AMD backend of a build with HIP: operations over launches on a GPU.
#include "backends/amd/amd.h"
#include "backends/amd/candidate_list.h"
#include "backends/amd/hip_device.h"
#include "backends/amd/hip_launch.h"

namespace dsv4::amd {

void HipLaunch::start(HipFunction function, int64_t blocks, int threads, const void* params) const {
  if (blocks == 0) return;
  // The runtime counts the lanes of a grid in 32 bits.
  if (blocks < 0 || blocks > std::numeric_limits<uint32_t>::max() / threads) {
    fail(ErrorCode::kInternal, "a grid of ", blocks, " blocks of ", threads,
         " lanes: the HIP runtime takes fewer than 2^32 lanes");
  }
  void* arguments[] = {const_cast<void*>(params)};
  DSV4_HIP(module_launch_kernel(function, static_cast<unsigned>(blocks), 1, 1,
                                static_cast<unsigned>(threads), 1, 1, 0, stream_, arguments,
                                nullptr));
}

std::span<const Candidate> hip_candidates() {
  return candidates<HipLaunch>();
}

std::unique_ptr<Device> open_device(int index) {
  return open_hip_device(index);
}

}  // namespace dsv4::amd
