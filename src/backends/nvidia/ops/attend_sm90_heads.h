// Attention on Hopper for few heads: what attend_sm90 hands to attend_sm90_heads.
#pragma once
#include <cuda_runtime_api.h>

#include "backends/nvidia/ops/attend_sm90.h"

namespace dsv4::nvidia {

/// Heads of a tile for a call that attend_sm90 takes, or 0: the kernel of 64 heads has to take it.
/// Looks at heads, addresses and strides alone.
int attend_sm90_heads_tile(const AttendArgs& args);

/// Launches the kernel, and the merge of chains; args.log2_tiles is 0.
void attend_sm90_heads(const AttendSm90Args& args, KvFormat format, int grid, cudaStream_t stream);

/// The kernel for one row format and tiles of 16 or 32 heads; `grid` CTAs.
template <KvFormat kFormat, int kHeads>
void launch_attend_sm90_heads(const AttendSm90Args& args, int grid, cudaStream_t stream);

}  // namespace dsv4::nvidia
