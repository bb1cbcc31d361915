// Number formats in kernels: the rules of core/numbers.h in straight-line integer or exact float
// arithmetic. OCP E4M3 on every chip. Source: spec/numerics.md 1-3.
#pragma once
#include "backends/gpu/platform.h"

namespace dsv4::gpu {

/// bf16 in memory.
struct Bf16 {
  uint16_t bits;
};

DSV4_DEVICE uint32_t bits_of(float value) {
  return std::bit_cast<uint32_t>(value);
}
DSV4_DEVICE float float_of(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
DSV4_DEVICE bool is_nan(float value) {
  return !(value == value);
}
DSV4_DEVICE bool is_finite(float value) {
  return (bits_of(value) & 0x7f800000u) != 0x7f800000u;
}
DSV4_DEVICE float magnitude(float value) {
  return float_of(bits_of(value) & 0x7fffffffu);
}
DSV4_DEVICE float with_sign(float size, float sign) {
  return float_of(bits_of(size) | (bits_of(sign) & 0x80000000u));
}
constexpr float kQuietNan = std::bit_cast<float>(0x7fc00000u);

// ---- bf16

/// Two neighbours as one little-endian word, each nearest, ties to even; NaN stays a NaN, of a
/// payload that is the platform's.
DSV4_DEVICE uint32_t pack_bf16(float even, float odd) {
  return platform::pack_bf16(even, odd);
}
DSV4_DEVICE Bf16 to_bf16(float value) {
  return {static_cast<uint16_t>(pack_bf16(value, value))};
}
/// After a round trip through bf16.
DSV4_DEVICE float bf16_value(float value) {
  return float_of(pack_bf16(0.0f, value) & 0xffff0000u);
}
DSV4_DEVICE float even_of(uint32_t pair) {
  return float_of(pair << 16);
}
DSV4_DEVICE float odd_of(uint32_t pair) {
  return float_of(pair & 0xffff0000u);
}

DSV4_DEVICE float to_float(float value) {
  return value;
}
DSV4_DEVICE float to_float(Bf16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
template <typename T>
DSV4_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(Bf16)) {
    return to_bf16(value);
  } else {
    return value;
  }
}

// ---- power-of-two scales

/// 2^exponent, -126 <= exponent <= 127.
DSV4_DEVICE float exp2_int(int exponent) {
  return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}
/// ceil(log2(amax / qmax)) in the exact integer form (numerics.md 3).
DSV4_DEVICE int ceil_log2_ratio(float amax, float qmax) {
  const uint32_t bits = bits_of(amax * (1.0f / qmax));
  return static_cast<int>((bits >> 23) & 0xffu) - 127 + ((bits & 0x7fffffu) != 0 ? 1 : 0);
}

constexpr float kE4m3Max = 448.0f;
constexpr float kE2m1Max = 6.0f;
/// Floors of amax: KV rows and indexer FP8; MXFP4; the fused inverse rotation.
constexpr float kFp8AmaxFloor = 1e-4f;
constexpr float kMxfp4AmaxFloor = 6 * 0x1p-126f;
constexpr float kInverseRopeAmaxFloor = 1e-10f;

struct Scale {
  float value;    // 2^e, or NaN where the group holds a NaN or infinity: the fault stays visible
  float inverse;  // 2^-e
  int exponent;
};
/// `amax` is the float of the largest magnitude bits: a NaN where any value was one.
DSV4_DEVICE Scale scale_for(float amax, float floor, float qmax) {
  if (!is_finite(amax)) return {kQuietNan, kQuietNan, 128};
  const int exponent = ceil_log2_ratio(amax < floor ? floor : amax, qmax);
  return {exp2_int(exponent), exp2_int(-exponent), exponent};
}
/// Its UE8M0 byte: 255 where the scale is NaN.
DSV4_DEVICE uint8_t e8m0_of(const Scale& scale) {
  return static_cast<uint8_t>(scale.exponent + 127);
}
/// 2^(byte-127); byte 0 is the subnormal 2^-127, 255 is NaN.
DSV4_DEVICE float e8m0_to_float(uint32_t byte) {
  return byte == 0 ? float_of(0x00400000u) : byte == 255 ? kQuietNan : float_of(byte << 23);
}

// ---- E4M3

/// Nearest-even value of E4M3FN for |x| <= 448 (1 + 2^-22): what a scale of scale_for leaves.
DSV4_DEVICE float round_to_e4m3(float x) {
  // Below 2^-6 the grid is 2^-9, the spacing of floats at 2^14: an addition rounds to it. Above,
  // drop 20 mantissa bits.
  const float size = magnitude(x);
  if (!(size >= 0x1p-6f)) return with_sign((size + 0x1p14f) - 0x1p14f, x);  // NaN, too
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
}

/// Both of a pair.
DSV4_DEVICE void round_pair_to_e4m3(float& even, float& odd) {
  if (platform::round_pair_to_e4m3(even, odd)) return;
  even = round_to_e4m3(even);
  odd = round_to_e4m3(odd);
}

/// Code of E4M3FN: nearest-even, saturating at 448; NaN -> 0x7f, sign kept.
DSV4_DEVICE uint8_t to_e4m3(float value) {
  // The codes of a binade count steps of 1/8 of it; below 2^-6 the steps stay those of that binade.
  // Adding 2^20 times the binade makes the step the last bit of the sum.
  constexpr int32_t kMinExponent = 127 - 6, kMaxBits = 0x43e00000;  // 2^-6, 448
  const auto bits = std::bit_cast<int32_t>(value);
  const int32_t size = bits & 0x7fffffff;
  const int32_t sign = (bits >> 24) & 0x80;
  if (size > 0x7f800000) return static_cast<uint8_t>(0x7f | sign);
  const int32_t clamped = size < kMaxBits ? size : kMaxBits;
  const int32_t exponent = (clamped >> 23) > kMinExponent ? clamped >> 23 : kMinExponent;
  const int32_t binade = (exponent + 20) << 23;
  const float sum = std::bit_cast<float>(clamped) + std::bit_cast<float>(binade);
  const int32_t steps = std::bit_cast<int32_t>(sum) - binade;  // 8..16, or 0..8 below 2^-6
  return static_cast<uint8_t>((((exponent - kMinExponent) << 3) + steps) | sign);
}
/// Codes of two finite numbers, the even one in the low byte.
DSV4_DEVICE uint32_t pack_e4m3(float even, float odd) {
  uint32_t codes = 0;
  if (platform::pack_e4m3(even, odd, codes)) return codes;
  return uint32_t{to_e4m3(even)} | uint32_t{to_e4m3(odd)} << 8;
}
DSV4_DEVICE float e4m3_to_float(uint32_t code) {
  const uint32_t size = code & 0x7fu;
  const float value = float_of(size << 20) * 0x1p120f;  // denormal products are exact
  return with_sign(size == 0x7fu ? kQuietNan : value, float_of(code << 24));
}

// ---- E2M1

/// Nearest-even value of E2M1 for |x| <= 6 (1 + 2^-22). Grid 0.5 below 2, 1 below 4, else 2: the
/// spacings of floats at 2^22, 2^23 and 2^24.
DSV4_DEVICE float round_to_e2m1(float x) {
  const float size = magnitude(x);
  const float offset = size < 2.0f ? 0x1p22f : size < 4.0f ? 0x1p23f : 0x1p24f;
  return with_sign((size + offset) - offset, x);
}
/// Code 0..15 of a value of round_to_e2m1.
DSV4_DEVICE uint32_t e2m1_code(float rounded) {
  const uint32_t bits = bits_of(rounded);
  const uint32_t size = bits & 0x7fffffffu;
  // 0.5 is the only subnormal; 1 is code 2: exponent and upper mantissa bit above 2^0.
  const uint32_t code = size == 0             ? 0u
                        : size == 0x3f000000u ? 1u
                                              : (size >> 22) - (0x3f800000u >> 22) + 2u;
  return code | ((bits >> 28) & 8u);
}
DSV4_DEVICE float e2m1_to_float(uint32_t code) {
  const uint32_t size = code & 7u;
  const float value = size == 0   ? 0.0f
                      : size == 1 ? 0.5f
                                  : float_of(((size - 2u) << 22) + 0x3f800000u);
  return with_sign(value, float_of(code << 28));
}

}  // namespace dsv4::gpu
