// What the launcher of attend_sm80 and the files that instantiate its kernels share.
#pragma once
#include <cuda_runtime_api.h>

#include <span>

#include "backends/nvidia/ops/attend.h"

namespace dsv4::nvidia::attend80 {

/// How a call is cut up. Item = (token, tile of heads, chain range); tiles are neighbours.
struct Schedule {
  int32_t tiles = 1;          ///< of heads, per token
  int32_t spread_chains = 1;  ///< > 1: items of one chain each, merged by the second kernel
  int32_t items = 0;
  /// Partial values in the order of registers: one slot per item (spread) or per CTA.
  float2* values = nullptr;
  float2* state = nullptr;  ///< (max, sum) per head of a slot; sum < 0: the chain saw no row
};

/// One instantiation.
struct Kernel {
  void (*attend)(AttendArgs, Schedule);
  void (*merge)(AttendArgs, Schedule);
  int shared_bytes;
  int heads;  ///< of a tile
};

constexpr int kThreads = 256;
/// Larger tiles first, then more stages; the last one fits 99 KiB of shared memory. All give the
/// same bits.
std::span<const Kernel> fp8_ds_mla_kernels();
std::span<const Kernel> bf16_kernels();
std::span<const Kernel> fp8_kernels();

/// Scratch of a call with at most `max_entries` compressed rows a token, in default grids.
int64_t scratch_bytes(int64_t max_entries);

}  // namespace dsv4::nvidia::attend80
