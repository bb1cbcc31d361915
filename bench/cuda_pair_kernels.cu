#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>

#include "backends/nvidia/ops/gpu_check.h"
#include "bench/cuda_pair_kernels.h"
#include "cache/kv_format.h"

namespace dsv4::nvidia::bench {
namespace {

constexpr int kDim = 512, kWarps = 8, kRowsPerWarp = 4;

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four E4M3 codes times a power of two: exact in bf16.
__device__ uint2 dequantise(uint32_t codes, float scale) {
  const auto half = [](uint32_t two) {
    const __half2_raw raw =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
    return __half22float2(__half2(raw));
  };
  const float2 a = half(codes & 0xffffu), b = half(codes >> 16);
  return make_uint2(pack(a.x * scale, a.y * scale), pack(b.x * scale, b.y * scale));
}

// A warp takes kRowsPerWarp rows at once, so that enough bytes are under way. Lane i makes elements
// [16 i, 16 i + 16): lanes 0 to 27 from E4M3 codes, the others copy bf16.
__global__ void __launch_bounds__(32 * kWarps)
    gather_bf16_kernel(const std::byte* base, int64_t page_stride_bytes, int rows_per_page,
                       const int32_t* slots, int64_t count, uint4* out) {
  constexpr int kCodeLanes = Fp8DsMla::kNopeDim / 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kRowsPerWarp;
  uint4 low[kRowsPerWarp], high[kRowsPerWarp];
  float scale[kRowsPerWarp];
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    if (first + i >= count) break;
    const int slot = slots[first + i];
    const std::byte* page = base + slot / rows_per_page * page_stride_bytes;
    const int row = slot % rows_per_page;
    const std::byte* values = page + row * Fp8DsMla::kValueBytes;
    if (lane < kCodeLanes) {
      low[i] = __ldg(reinterpret_cast<const uint4*>(values) + lane);
      const std::byte* scales =
          page + rows_per_page * Fp8DsMla::kValueBytes + row * Fp8DsMla::kScaleBytes;
      const uint32_t exponent = static_cast<uint32_t>(scales[lane / 4]);
      scale[i] = __uint_as_float(exponent == 0 ? 0x400000u : exponent << 23);
    } else {
      const auto* rope = reinterpret_cast<const uint4*>(values + Fp8DsMla::kRopeOffsetBytes);
      low[i] = __ldg(rope + 2 * (lane - kCodeLanes));
      high[i] = __ldg(rope + 2 * (lane - kCodeLanes) + 1);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    if (first + i >= count) break;
    if (lane < kCodeLanes) {
      const uint4 codes = low[i];
      const uint2 a = dequantise(codes.x, scale[i]), b = dequantise(codes.y, scale[i]);
      const uint2 c = dequantise(codes.z, scale[i]), d = dequantise(codes.w, scale[i]);
      low[i] = make_uint4(a.x, a.y, b.x, b.y);
      high[i] = make_uint4(c.x, c.y, d.x, d.y);
    }
    uint4* to = out + (first + i) * (kDim / 8) + 2 * lane;
    to[0] = low[i];
    to[1] = high[i];
  }
}

// Non-negative floats order as their bits do.
__device__ void keep_largest(float* worst, float value) {
  if (!(value < INFINITY)) value = INFINITY;
  atomicMax(reinterpret_cast<int*>(worst), __float_as_int(value));
}

// One warp per token and head.
__global__ void __launch_bounds__(32 * kWarps) compare_kernel(Comparison what, float* worst) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= what.tokens * what.heads) return;
  const int64_t their_row = row / what.heads * what.their_heads + row % what.heads;
  const auto* ours = static_cast<const __nv_bfloat16*>(what.ours) + row * kDim;
  const auto* theirs = static_cast<const __nv_bfloat16*>(what.theirs) + their_row * kDim;
  float difference = 0, size = 0;
  for (int i = static_cast<int>(threadIdx.x % 32); i < kDim; i += 32) {
    const float a = __bfloat162float(ours[i]), b = __bfloat162float(theirs[i]);
    difference += (a - b) * (a - b);
    size += b * b;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    difference += __shfl_xor_sync(~0u, difference, lanes);
    size += __shfl_xor_sync(~0u, size, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    keep_largest(worst, sqrtf(difference / size));
    keep_largest(worst + 1, fabsf(what.our_lse[row] - what.their_lse[their_row]));
  }
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    compare_rows_kernel(const T* ours, int64_t our_stride, const T* theirs, int64_t their_stride,
                        int64_t cols, float* worst) {
  __shared__ float sums[2][kWarps];
  float difference = 0, size = 0;
  for (int64_t i = threadIdx.x; i < cols; i += blockDim.x) {
    const auto a = static_cast<float>(ours[blockIdx.x * our_stride + i]);
    const auto b = static_cast<float>(theirs[blockIdx.x * their_stride + i]);
    difference += (a - b) * (a - b);
    size += b * b;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    difference += __shfl_xor_sync(~0u, difference, lanes);
    size += __shfl_xor_sync(~0u, size, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    sums[0][threadIdx.x / 32] = difference;
    sums[1][threadIdx.x / 32] = size;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    difference += sums[0][warp];
    size += sums[1][warp];
  }
  keep_largest(worst, sqrtf(difference / size));
}

// A thread makes four numbers of one token.
__global__ void __launch_bounds__(32 * kWarps)
    expand_codes_kernel(const uint32_t* codes, const float* scale, int64_t scale_tokens,
                        int64_t tokens, int groups, int cols, uint2* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t col = 4 * i % cols, group = 4 * i / cols % groups, token = 4 * i / cols / groups;
  if (token >= tokens) return;
  out[i] = dequantise(codes[i], scale[(group * (cols / 128) + col / 128) * scale_tokens + token]);
}

unsigned blocks_for(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

void gather_bf16(const CacheView& cache, const int32_t* slots, int64_t count, void* out,
                 cudaStream_t stream) {
  if (count == 0) return;
  gather_bf16_kernel<<<blocks_for(count, kWarps * kRowsPerWarp), 32 * kWarps, 0, stream>>>(
      cache.base, cache.block_stride_bytes, cache.rows_per_block, slots, count,
      static_cast<uint4*>(out));
  DSV4_CUDA_CHECK_LAUNCH();
}

void compare(const Comparison& what, float* worst, cudaStream_t stream) {
  compare_kernel<<<blocks_for(what.tokens * what.heads, kWarps), 32 * kWarps, 0, stream>>>(what,
                                                                                           worst);
  DSV4_CUDA_CHECK_LAUNCH();
}

void compare_rows(DType dtype, RowsView ours, RowsView theirs, int64_t rows, int64_t cols,
                  float* worst, cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compare_rows_kernel<T><<<static_cast<unsigned>(rows), 32 * kWarps, 0, stream>>>(
        static_cast<const T*>(ours.data), ours.stride, static_cast<const T*>(theirs.data),
        theirs.stride, cols, worst);
  };
  if (dtype == DType::kBf16) {
    run(__nv_bfloat16{});
  } else {
    run(float{});
  }
  DSV4_CUDA_CHECK_LAUNCH();
}

void expand_codes(const void* codes, const float* scale, int64_t scale_tokens, int64_t tokens,
                  int groups, int cols, void* out, cudaStream_t stream) {
  expand_codes_kernel<<<blocks_for(tokens * groups * cols / 4, 32 * kWarps), 32 * kWarps, 0,
                        stream>>>(static_cast<const uint32_t*>(codes), scale, scale_tokens, tokens,
                                  groups, cols, static_cast<uint2*>(out));
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace dsv4::nvidia::bench
