// Outputs of sm90_attend as the codes that inverse_rope makes of them: what the grouped wo_a reads
// next, in half of the bytes and without a launch between.
#pragma once
#include "backends/gpu/math.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_softmax.cuh"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"

namespace dsv4::nvidia::sm90_attend {

/// Writes 64 heads x 256 dims as codes. A warp makes those of its own 16 rows in `staging`, where
/// store_output has left them; two lanes a row, with every other chunk of 8 columns, go through a
/// group of 128 twice. Its codes take the place of what has been read, and leave by the copy
/// engine. The steps of InverseRope (norm_rope.h), the same bits. In loops: code that runs once
/// comes from memory.
__device__ __forceinline__ void store_codes(const AttendSm90Args& args, const BlockHeader& item,
                                            int half, uint32_t staging, int barrier,
                                            const gpu::CosSin (&angles)[32]) {
  constexpr int kPanel = 64 * 128, kChunks = 8;  // of a lane and group
  const int lane = thread_of_role() & 31, row = (thread_of_role() >> 5) * 16 + lane % 16;
  const int part = lane / 16, swizzle = row % 8;
  const uint32_t row_at = staging + row * 128;
  const int head = static_cast<int>(item.tile) * 64 + row;
  __syncwarp();
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {
    // The last 64 of 512 dims are rotated: chunks 4 to 7 of a lane.
    const int plain = half + group == 2 ? kChunks / 2 : kChunks;
    const auto load = [&](int i) {
      return load_shared_16(row_at + (group * 2 + i / 4) * kPanel +
                            ((i % 4 * 2 + part ^ swizzle) << 4));
    };
    const auto load_rotated = [&](int i) {
      auto chunk = CodeColumns::of(load(i));
      chunk.rotate(angles + ((i - kChunks / 2) * 2 + part) * 4);
      return chunk;
    };
    const auto store = [&](int i, const CodeColumns& chunk, const GroupScale& scale) {
      const uint2 codes = chunk.codes(scale);
      sm90::store_shared_2(row_at + group * kPanel + ((i ^ swizzle) << 4) + part * 8, codes.x,
                           codes.y);
    };
    uint32_t two = 0;  // largest magnitudes of values of even and odd columns
#pragma unroll 4
    for (int i = 0; i < plain; ++i) {
      const uint4 words = load(i);
      for (const uint32_t pair : {words.x, words.y, words.z, words.w})
        two = __vmaxu2(two, pair & 0x7fff7fffu);
    }
    uint32_t largest = max(two << 16, two & 0xffff0000u);
#pragma unroll 1
    for (int i = plain; i < kChunks; ++i) {
      largest = load_rotated(i).larger(largest);
    }
    largest = max(largest, __shfl_xor_sync(~0u, largest, 16));
    const GroupScale scale = group_scale(largest, gpu::kInverseRopeAmaxFloor);
    if (part == 0 && head < args.attend.num_heads) {
      const int64_t column = int64_t{head} * 4 + half * 2 + group;
      args.codes.scale[column * args.codes.scale_stride + item.token] = scale.value();
    }
#pragma unroll 2
    for (int i = 0; i < plain; ++i) {
      const auto chunk = CodeColumns::of(load(i));
      __syncwarp();
      store(i, chunk, scale);
    }
#pragma unroll 1
    for (int i = plain; i < kChunks; ++i) {
      const CodeColumns chunk = load_rotated(i);
      __syncwarp();
      store(i, chunk, scale);
    }
  }
  sm90::fence_proxy_async();
  sm90::barrier_sync(barrier, 128);
  if (thread_of_role() == 0) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      sm90::store_box(args.out_map, half * 256 + i * 128, static_cast<int>(item.tile) * 64,
                      item.token, staging + i * kPanel);
    }
    sm90::store_commit();
  }
}

}  // namespace dsv4::nvidia::sm90_attend
