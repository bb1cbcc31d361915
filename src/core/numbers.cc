#include "core/numbers.h"

#include <algorithm>

namespace dsv4 {
namespace {

// Nearest-even onto a grid of 1 sign, `kExponentBits` and `kMantissaBits`, by exact float
// arithmetic: the spacing at |value| is a power of two, so value / spacing is exact and
// std::nearbyint rounds ties to even.
float round_to_grid(float magnitude, int min_exponent, int mantissa_bits) {
  int exponent;
  std::frexp(magnitude, &exponent);
  const int spacing_exponent = std::max(exponent - 1, min_exponent) - mantissa_bits;
  return std::ldexp(std::nearbyint(std::ldexp(magnitude, -spacing_exponent)), spacing_exponent);
}

// Code of an exact grid value of an 8-bit format with 3 mantissa bits.
uint8_t encode_3bit_mantissa(float magnitude, int bias) {
  const int min_exponent = 1 - bias;
  if (magnitude == 0.0f) return 0;
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, min_exponent);
  const int mantissa =
      static_cast<int>(std::ldexp(magnitude, 3 - exponent));  // 8..15 normal, 1..7 subnormal
  return static_cast<uint8_t>(mantissa >= 8 ? (exponent + bias) << 3 | (mantissa - 8) : mantissa);
}

float decode_3bit_mantissa(uint8_t code, int bias) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), 1 - bias - 3)
                    : std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - bias);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

constexpr int kE4m3Bias = 7;
constexpr int kFnuzBias = 8;
constexpr float kFnuzMax = 240.0f;

}  // namespace

float e4m3_to_f32(uint8_t code) {
  if ((code & 0x7f) == 0x7f)
    return std::bit_cast<float>(0x7fc00000u | static_cast<uint32_t>(code & 0x80) << 24);
  return decode_3bit_mantissa(code, kE4m3Bias);
}

uint8_t f32_to_e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const float magnitude = std::min(std::fabs(value), kE4m3Max);
  return sign | encode_3bit_mantissa(round_to_grid(magnitude, 1 - kE4m3Bias, 3), kE4m3Bias);
}

float e4m3fnuz_to_f32(uint8_t code) {
  if (code == 0x80) return std::bit_cast<float>(0x7fc00000u);
  return decode_3bit_mantissa(code, kFnuzBias);
}

uint8_t f32_to_e4m3fnuz(float value) {
  if (std::isnan(value)) return 0x80;
  const float magnitude = std::min(std::fabs(value), kFnuzMax);
  const uint8_t code = encode_3bit_mantissa(round_to_grid(magnitude, 1 - kFnuzBias, 3), kFnuzBias);
  return code == 0 ? 0 : static_cast<uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

float e2m1_to_f32(uint8_t code) {
  constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float magnitude = kValues[code & 7];
  return (code & 8) != 0 ? -magnitude : magnitude;
}

uint8_t f32_to_e2m1(float value) {
  const float a = std::fabs(value);
  // Upper bounds of codes 0..6; a tie goes to the even code.
  const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) +
                   (a >= 3.5f) + (a > 5.0f);
  return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

}  // namespace dsv4
