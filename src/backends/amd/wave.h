// Lanes of a whole wave of 64, for kernels around matrix instructions. Shared kernels know groups
// of 32 only (gpu/platform.h).
#pragma once
#include "backends/amd/instructions.h"

namespace dsv4::amd {

constexpr int kWaveLanes = 64;

/// 0..63 within the wave; which wave of the block, in a scalar register.
DSV4_DEVICE int wave_lane() {
  return gpu::thread_idx() % kWaveLanes;
}
DSV4_DEVICE int wave_idx() {
  return uniform(gpu::thread_idx() / kWaveLanes);
}

/// The value of lane `wave_lane() ^ mask`. All lanes of the wave take part.
DSV4_DEVICE float wave_shuffle_xor(float value, int mask) {
#if defined(__HIP__)
  const int from = wave_lane() ^ mask;
  return std::bit_cast<float>(
      __builtin_amdgcn_ds_bpermute(from << 2, std::bit_cast<int32_t>(value)));
#else
  return std::bit_cast<float>(
      gpu::executor::shuffle_xor(kWaveLanes, std::bit_cast<uint32_t>(value), mask));
#endif
}

}  // namespace dsv4::amd
