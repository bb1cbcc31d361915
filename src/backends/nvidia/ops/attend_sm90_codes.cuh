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

/// Of a token's inverse rotation, a pair of dims a lane; a warp calls.
__device__ __forceinline__ void find_angles(const RotatedCodes& codes, int token,
                                            float2 (&angles)[32]) {
  const int lane = thread_of_role() & 31;
  const gpu::CosSin at = gpu::rope_angle(codes.positions[token], codes.frequencies[lane]);
  angles[lane] = make_float2(at.cos, -at.sin);
}

/// Eight neighbours of a row.
struct CodeChunk {
  float x[8];

  __device__ __forceinline__ explicit CodeChunk(const uint4& words) {
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ void rotate(const float2* angles) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 at = angles[i / 2];
      const float even = x[i], odd = x[i + 1];
      x[i] = __fsub_rn(__fmul_rn(even, at.x), __fmul_rn(odd, at.y));
      x[i + 1] = __fadd_rn(__fmul_rn(odd, at.x), __fmul_rn(even, at.y));
    }
  }
  __device__ __forceinline__ void store(uint32_t to, const GroupScale& scale) const {
    const float by = __uint_as_float((254 - scale.exponent) << 23);
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* of = x + 4 * i;
      codes[i] = sm90::e4m3x2(of[0] * by, of[1] * by) | sm90::e4m3x2(of[2] * by, of[3] * by) << 16;
      if (!scale.finite) codes[i] = 0x7f7f7f7f;
    }
    sm90::store_shared_2(to, codes[0], codes[1]);
  }
};

/// Writes 64 heads x 256 dims as codes. A warp makes those of its own 16 rows in `staging`, where
/// store_output has left them; two lanes a row, with every other chunk of 8 columns, go through a
/// group of 128 twice. Its codes take the place of what has been read, and leave by the copy
/// engine. The steps of InverseRope (norm_rope.h), the same bits. In loops: code that runs once
/// comes from memory.
__device__ __forceinline__ void store_codes(const AttendSm90Args& args, const BlockHeader& item,
                                            int half, uint32_t staging, int barrier,
                                            const float2 (&angles)[32]) {
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
      CodeChunk chunk(load(i));
      chunk.rotate(angles + ((i - kChunks / 2) * 2 + part) * 4);
      return chunk;
    };
    const auto place = [&](int i) {
      return row_at + group * kPanel + ((i ^ swizzle) << 4) + part * 8;
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
      for (const float value : load_rotated(i).x)
        largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
    }
    largest = max(largest, __shfl_xor_sync(~0u, largest, 16));
    const GroupScale scale = group_scale(largest, gpu::kInverseRopeAmaxFloor);
    if (part == 0 && head < args.attend.num_heads) {
      const int64_t column = int64_t{head} * 4 + half * 2 + group;
      args.codes.scale[column * args.codes.scale_stride + item.token] = scale.value();
    }
#pragma unroll 2
    for (int i = 0; i < plain; ++i) {
      const CodeChunk chunk(load(i));
      __syncwarp();
      chunk.store(place(i), scale);
    }
#pragma unroll 1
    for (int i = plain; i < kChunks; ++i) {
      const CodeChunk chunk = load_rotated(i);
      __syncwarp();
      chunk.store(place(i), scale);
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
