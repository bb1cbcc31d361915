// The number formats of DeepSeek-V4 and their exact rounding rules: bf16, E4M3 (OCP "fn" and AMD
// "fnuz"), UE8M0, E2M1. Scalar definitions that everything else must agree with bit for bit.
// Source: spec/numerics.md 1-3.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace dsv4 {

// ---- bfloat16: the upper half of a float
// ----------------------------------------------------------------------------

inline float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

/// Nearest, ties to even; NaN stays NaN (quiet).
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Value after a round trip through bf16.
inline float round_bf16(float value) {
  return bf16_to_f32(f32_to_bf16(value));
}

/// A bf16 that converts implicitly, for loops that read like equations.
struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  explicit Bf16(float value) : bits(f32_to_bf16(value)) {}
  operator float() const { return bf16_to_f32(bits); }
};
static_assert(sizeof(Bf16) == 2);

// ---- UE8M0: power-of-two scales
// ------------------------------------------------------------------------------------

/// 2^(byte-127); byte 0 is the subnormal 2^-127, 255 is NaN.
inline float e8m0_to_f32(uint8_t byte) {
  if (byte == 0) return std::bit_cast<float>(0x00400000u);
  if (byte == 255) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(static_cast<uint32_t>(byte) << 23);
}

/// 2^exponent for -126 <= exponent <= 127, exactly.
inline float exp2_int(int exponent) {
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

/// e = ceil(log2(amax / qmax)) in the exact integer form of the reference kernels: y = amax *
/// fp32(1/qmax), then the exponent field, plus one when the mantissa is not zero. qmax is 448
/// (E4M3), 224 (FNUZ recipes) or 6 (E2M1).
inline int ceil_log2_ratio(float amax, float qmax) {
  const uint32_t bits = std::bit_cast<uint32_t>(amax * (1.0f / qmax));
  return static_cast<int>((bits >> 23) & 0xffu) - 127 + ((bits & 0x7fffffu) != 0 ? 1 : 0);
}

// ---- E4M3
// ----------------------------------------------------------------------------------------------------------

constexpr float kE4m3Max = 448.0f;

/// OCP E4M3FN code -> value (0x7f and 0xff are NaN).
float e4m3_to_f32(uint8_t code);
/// Nearest-even, saturating at 448; NaN -> 0x7f (sign kept).
uint8_t f32_to_e4m3(float value);
/// FNUZ (gfx942) code -> value (0x80 is NaN); half the OCP value of the same code.
float e4m3fnuz_to_f32(uint8_t code);
/// Nearest-even, saturating at 240; NaN -> 0x80; -0 -> 0.
uint8_t f32_to_e4m3fnuz(float value);

// ---- E2M1
// ----------------------------------------------------------------------------------------------------------

constexpr float kE2m1Max = 6.0f;

/// 4-bit code (bit 3 = sign) -> 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
float e2m1_to_f32(uint8_t code);
/// Nearest-even, saturating at 6. NaN has no code: the caller excludes it.
uint8_t f32_to_e2m1(float value);

}  // namespace dsv4
