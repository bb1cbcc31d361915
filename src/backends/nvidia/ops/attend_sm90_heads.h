// Attention on Hopper for few heads: what attend_sm90 hands to attend_sm90_heads.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backends/nvidia/ops/attend_sm90.h"

namespace dsv4::nvidia {

/// Heads of a tile for a call that attend_sm90 takes, or 0: the kernel of 64 heads has to take it.
/// Looks at heads, addresses and strides alone.
int attend_sm90_heads_tile(const AttendArgs& args);

/// What the CTA that begins an item leaves for the one that goes on with it: the sums so far, as
/// threads of the output role hold them.
template <int kHeads>
struct UnfinishedItem {
  float4 values[kHeads][128];
  float sums[128];  ///< of weights
  float reference[kHeads];
  uint64_t mark;  ///< written last; see HandOvers
};

/// Where blocks are dealt out instead of items (attend_sm90_heads_deal.cuh): an UnfinishedItem for
/// every CTA, or null. Nobody clears that memory: a launch's own `mark` says that an item is there,
/// and who reads the item takes it away, so that a captured launch finds none of its last run.
struct HandOvers {
  std::byte* items = nullptr;
  uint64_t mark = 0;
};

/// Bytes of the UnfinishedItems that a call of so many items needs, or 0: items are dealt out.
int64_t attend_sm90_heads_hand_over_bytes(const AttendArgs& args, int64_t num_items);
/// The largest number of them, on any device.
int64_t attend_sm90_heads_max_hand_over_bytes();

/// Launches the kernel, and the merge of chains; args.log2_tiles is 0. `unfinished`: see
/// attend_sm90_heads_hand_over_bytes.
void attend_sm90_heads(const AttendSm90Args& args, KvFormat format, std::byte* unfinished,
                       cudaStream_t stream);

/// The kernel for one row format and tiles of 16 or 32 heads; `grid` CTAs.
template <KvFormat kFormat, int kHeads>
void launch_attend_sm90_heads(const AttendSm90Args& args, const HandOvers& hand_overs, int grid,
                              cudaStream_t stream);

}  // namespace dsv4::nvidia
