// Quantisation of the input of a dense product (numerics.md 3, 4). Included by kernels only.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace dsv4::nvidia {

constexpr int kQuantiseGroup = 128;  ///< columns that share a scale
constexpr int kQuantiseCols = 4;     ///< of a lane: a warp holds a group

/// ceil(log2(amax / 448)) in the bit form, as a biased exponent.
__device__ __forceinline__ uint32_t quantise_exponent(float amax) {
  const uint32_t bits = __float_as_uint(__fmul_rn(amax, 1.0f / 448.0f));
  return (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1 : 0);
}

/// A group's values replaced by E4M3 numbers, which times the returned power of two are the
/// quantised values; by NaN where one of them is infinite or NaN. `floor` bounds the largest
/// magnitude from below. All lanes of a warp call it, each with its columns.
__device__ __forceinline__ float quantise_group_codes(float (&values)[kQuantiseCols], float floor) {
  float amax = floor;
  bool finite = true;
#pragma unroll
  for (const float value : values) {
    finite = finite && fabsf(value) < __int_as_float(0x7f800000);
    amax = fmaxf(amax, fabsf(value));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  finite = __all_sync(0xffffffffu, finite);
  if (!finite) amax = floor;
  const uint32_t exponent = quantise_exponent(amax);
  const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
  for (float& value : values) {
    const float v = fminf(448.0f, fmaxf(-448.0f, value * inverse));
    // Adding and subtracting 1.5 * 2^23 units rounds to whole units, ties to even. The unit of a
    // code is 2^-3 of the power of two below it, 2^-9 for subnormal codes.
    const uint32_t power = max(__float_as_uint(v) >> 23 & 0xffu, 121u);
    const float magic = __uint_as_float((power + 20) << 23 | 0x400000u);
    value = finite ? __fsub_rn(__fadd_rn(v, magic), magic) : __uint_as_float(0x7fc00000u);
  }
  return __uint_as_float(exponent << 23);
}

/// Smallest amax of a linear's input.
constexpr float kQuantiseFloor = 1e-4f;

/// The same through the codes and back.
__device__ __forceinline__ void quantise_group(float (&values)[kQuantiseCols]) {
  const float scale = quantise_group_codes(values, kQuantiseFloor);
#pragma unroll
  for (float& value : values) value *= scale;
}

/// The code of an E4M3 number or NaN.
__device__ __forceinline__ uint32_t e4m3_code(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fu;
  // From 2^-6 on the exponent is rebiased by 120; below, codes count units of 2^-9.
  return sign |
         (magnitude >= 121u << 23 ? (magnitude >> 20) - (120u << 3)
                                  : static_cast<uint32_t>(__uint_as_float(magnitude) * 512.0f));
}

__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

}  // namespace dsv4::nvidia
