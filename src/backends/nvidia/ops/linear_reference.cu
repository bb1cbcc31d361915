// linear_reference: products of any operands, without tensor cores: f32 x (the head), f32 weights,
// rows that are not aligned, odd scale blocks.
//
// Problem   out[m, n] = sum_k x[m, k] W[n, k]
// Tiling    warp = 4 rows of W x 1 or 8 tokens; a lane takes 8 columns of every 256
// Budget    one token: bytes of W once; 8 tokens: 64 B of x from L1 per 4 x 8 x 8 / 32 = 8
//           instructions fma
// Launch    grid (row tiles x token tiles) of all items, 256 threads, no shared memory
// Contract  any alignment; x and W beyond their ends not read
// Numerics  one fma chain per lane in ascending k, then sums of lanes l and l ^ 16, 8, 4, 2, 1: the
//           same for every number of tokens and every type
#include <cuda_bf16.h>

#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kWarps = 8, kRows = 4;
constexpr int kLaneCols = 8, kStepCols = 32 * kLaneCols;

__device__ __forceinline__ float bf16_value(uint32_t bits) {
  return __uint_as_float(bits << 16);
}
__device__ __forceinline__ float scale_value(uint32_t byte) {
  return byte == 0     ? 0x1p-127f
         : byte == 255 ? __uint_as_float(0x7fc00000u)
                       : __uint_as_float(byte << 23);
}
// Bits of an f32 with exponents as small as those of the code, then a power of two.
__device__ __forceinline__ float e4m3_value(uint32_t code) {
  const float value = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
  return (code & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : value;
}
__device__ __forceinline__ float e2m1_value(uint32_t code) {
  return __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}

// Elements [k, k + 8) of a row of bf16 or f32; zero beyond `cols`.
__device__ __forceinline__ void load_plain(const void* row, bool f32, bool aligned, int k, int cols,
                                           float (&v)[kLaneCols]) {
  if (aligned && k + kLaneCols <= cols) {
    if (f32) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(row) + k);
      const float4 a = __ldg(from), b = __ldg(from + 1);
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z,
      v[7] = b.w;
    } else {
      const uint4 a = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + k));
      const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i)
        v[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    v[i] = k + i >= cols ? 0.0f
           : f32         ? static_cast<const float*>(row)[k + i]
                         : bf16_value(static_cast<const uint16_t*>(row)[k + i]);
  }
}

template <DType kDType>
__device__ __forceinline__ void load_weight(const LinearWeight& w, int row, bool aligned, int k,
                                            float (&v)[kLaneCols]) {
  const uint8_t* data = w.data + row * w.row_bytes;
  if constexpr (kDType == DType::kF32 || kDType == DType::kBf16) {
    load_plain(data, kDType == DType::kF32, aligned, k, w.cols, v);
  } else {
    const uint8_t* scales = w.scale + row / w.block_rows * w.scale_stride;
    constexpr int kBits = kDType == DType::kF8E4M3 ? 8 : 4;
    uint64_t codes = 0;
    if (aligned && k + kLaneCols <= w.cols) {
      if constexpr (kBits == 8) {
        codes = __ldg(reinterpret_cast<const unsigned long long*>(data + k));
      } else {
        codes = __ldg(reinterpret_cast<const unsigned*>(data + k / 2));
      }
    } else {
      for (int i = 0; i < kLaneCols * kBits / 8; ++i) {
        if (k + i * 8 / kBits < w.cols)
          codes |= static_cast<uint64_t>(data[k * kBits / 8 + i]) << (8 * i);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) {
      const auto code = static_cast<uint32_t>(codes >> (kBits * i)) & ((1u << kBits) - 1);
      const float scale = k + i < w.cols ? scale_value(scales[(k + i) / w.block_cols]) : 0.0f;
      v[i] = (kBits == 8 ? e4m3_value(code) : e2m1_value(code)) * scale;
    }
  }
}

template <DType kDType, int kTokens>
__device__ __forceinline__ void multiply(const LinearItem& item, int row0, int token0) {
  const LinearWeight& w = item.w;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int x_bytes = item.x_f32 ? 4 : 2;
  const bool x_aligned =
      (reinterpret_cast<uintptr_t>(item.x) | static_cast<uintptr_t>(item.x_stride * x_bytes)) %
          16 ==
      0;
  const bool w_aligned =
      (reinterpret_cast<uintptr_t>(w.data) | static_cast<uintptr_t>(w.row_bytes)) % 16 == 0;
  float sums[kRows][kTokens] = {};
  for (int k = lane * kLaneCols; k < w.cols; k += kStepCols) {
    float values[kRows][kLaneCols];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      load_weight<kDType>(w, min(row0 + r, w.rows - 1), w_aligned, k, values[r]);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const int token = min(token0 + m, item.tokens - 1);
      float x[kLaneCols];
      load_plain(static_cast<const std::byte*>(item.x) + token * item.x_stride * x_bytes,
                 item.x_f32, x_aligned, k, w.cols, x);
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][m] = __fmaf_rn(values[r][i], x[i], sums[r][m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = sums[r][m];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane != 0 || row0 + r >= w.rows || token0 + m >= item.tokens) continue;
      const int64_t element = (token0 + m) * item.out_stride + row0 + r;
      if (item.out_f32) {
        static_cast<float*>(item.out)[element] = sum;
      } else {
        static_cast<__nv_bfloat16*>(item.out)[element] = __float2bfloat16_rn(sum);
      }
    }
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kWarps * 32)
    linear_reference(const __grid_constant__ LinearBatch batch) {
  const auto block = static_cast<int>(blockIdx.x);
  int i = 0;
  while (i + 1 < batch.count && block >= batch.items[i + 1].first_tile) ++i;
  const LinearItem& item = batch.items[i];
  const int token_tiles = (item.tokens + kTokens - 1) / kTokens;
  const int tile = block - item.first_tile;
  const int row0 = (tile / token_tiles * kWarps + static_cast<int>(threadIdx.x) / 32) * kRows;
  const int token0 = tile % token_tiles * kTokens;
  if (row0 >= item.w.rows) return;
  switch (item.w.dtype) {
    case DType::kF32:
      return multiply<DType::kF32, kTokens>(item, row0, token0);
    case DType::kBf16:
      return multiply<DType::kBf16, kTokens>(item, row0, token0);
    case DType::kF8E4M3:
      return multiply<DType::kF8E4M3, kTokens>(item, row0, token0);
    default:
      return multiply<DType::kF4E2M1, kTokens>(item, row0, token0);
  }
}

template <int kTokens>
void launch(LinearBatch& batch, cudaStream_t stream) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    LinearItem& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, kWarps * kRows) * ceil_div(item.tokens, kTokens);
  }
  linear_reference<kTokens><<<static_cast<unsigned>(tiles), kWarps * 32, 0, stream>>>(batch);
  DSV4_CUDA_CHECK_LAUNCH();
}

}  // namespace

void launch_linear_reference(LinearBatch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  int32_t max_tokens = 0;
  for (int i = 0; i < batch.count; ++i) max_tokens = max(max_tokens, batch.items[i].tokens);
  if (max_tokens == 1) {
    launch<1>(batch, stream);
  } else {
    launch<8>(batch, stream);
  }
}

}  // namespace dsv4::nvidia
