// E4M3 codes of bf16 values for the FP8 products of sm_90 (numerics.md 3, 4, in the bit form).
// Included by kernels only.
#pragma once
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

/// Bits of the larger magnitude of two values in bf16.
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t pair) {
  return max(pair << 16 & 0x7fffffffu, pair & 0x7fff0000u);
}

}  // namespace dsv4::nvidia
