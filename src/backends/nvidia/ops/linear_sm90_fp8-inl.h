// E4M3 codes of bf16 values for the FP8 products of sm_90 (numerics.md 3, 4, in the bit form).
// Included by kernels only.
#pragma once
#include "backends/gpu/math.h"
#include "backends/gpu/row.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/ops/linear_quantise-inl.h"

namespace dsv4::nvidia {

/// The scale of a group of 128 columns, a power of two.
struct GroupScale {
  bool finite;
  uint32_t exponent;  ///< biased

  __device__ __forceinline__ float value() const { return __uint_as_float(exponent << 23); }
  /// Codes of two values in bf16, the first in the low byte; NaN where one of the group is infinite
  /// or NaN.
  __device__ __forceinline__ uint32_t codes(uint32_t pair) const {
    const float inverse = __uint_as_float((254 - exponent) << 23);
    return finite ? sm90::e4m3x2(__uint_as_float(pair << 16) * inverse,
                                 __uint_as_float(pair & 0xffff0000u) * inverse)
                  : 0x7f7fu;
  }
};
/// `largest`: bits of the largest magnitude, which order as floats do, NaN above infinity.
__device__ __forceinline__ GroupScale group_scale(uint32_t largest, float floor) {
  const bool finite = largest < 0x7f800000u;
  return {finite, quantise_exponent(finite ? fmaxf(__uint_as_float(largest), floor) : floor)};
}

/// Eight neighbouring columns of a row, on their way to codes.
struct CodeColumns {
  float x[8];

  __device__ __forceinline__ static CodeColumns of(const uint4& words) {
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
    CodeColumns out;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out.x[i] = i % 2 == 0 ? gpu::even_of(pairs[i / 2]) : gpu::odd_of(pairs[i / 2]);
    return out;
  }
  /// Products and sums are rounded separately, as in gpu::rotate_tail, wherever it is compiled.
  __device__ __forceinline__ void rotate(const gpu::CosSin* angles) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const gpu::CosSin at = angles[i / 2];
      const float even = x[i], odd = x[i + 1];
      x[i] = __fsub_rn(__fmul_rn(even, at.cos), __fmul_rn(odd, at.sin));
      x[i + 1] = __fadd_rn(__fmul_rn(odd, at.cos), __fmul_rn(even, at.sin));
    }
  }
  /// Bits of the larger one of `largest` and the largest magnitude.
  __device__ __forceinline__ uint32_t larger(uint32_t largest) const {
#pragma unroll
    for (const float value : x) largest = max(largest, gpu::magnitude_bits(value));
    return largest;
  }
  __device__ __forceinline__ uint2 codes(const GroupScale& scale) const {
    const float by = __uint_as_float((254 - scale.exponent) << 23);
    uint32_t out[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* of = x + 4 * i;
      out[i] = sm90::e4m3x2(of[0] * by, of[1] * by) | sm90::e4m3x2(of[2] * by, of[3] * by) << 16;
      if (!scale.finite) out[i] = 0x7f7f7f7f;
    }
    return {out[0], out[1]};
  }
};

/// Bits of the larger magnitude of two values in bf16.
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t pair) {
  return max(pair << 16 & 0x7fffffffu, pair & 0x7fff0000u);
}

}  // namespace dsv4::nvidia
