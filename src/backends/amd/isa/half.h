// IEEE half precision, and sums that are rounded once.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace dsv4::amd::isa {

struct Half {
  uint16_t bits = 0;
};

inline float half_to_f32(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t magnitude = half.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent field moves by 112; subnormals become normal floats by the multiplication.
  return std::bit_cast<float>(
      sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

/// Nearest even from a double: no second rounding for anything computed exactly in double.
inline Half f64_to_half(double value) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 48 & 0x8000u);
  const double magnitude = std::fabs(value);
  if (!(magnitude == magnitude))
    return {static_cast<uint16_t>(sign | 0x7e00u | (bits >> 42 & 0x1ffu))};
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x1p-14) {
    // Adding 2^-24 * 1.5 * 2^52 leaves the subnormal's integer in the low bits.
    const double shifted = magnitude + 0x1.8p28;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint64_t>(shifted) & 0x7ffu))};
  }
  const uint64_t m = std::bit_cast<uint64_t>(magnitude);
  const uint64_t rounded = m + 0x1ffffffffffu + (m >> 42 & 1);
  return {static_cast<uint16_t>(sign | ((rounded >> 42) - (uint64_t{1023 - 15} << 10)))};
}
inline Half f32_to_half(float value) {
  return f64_to_half(static_cast<double>(value));
}

/// a * b + c where a * b is exact in double: the sum rounded to odd, so that rounding it again to
/// a format of at most 51 bits gives what one rounding gives.
inline double exact_product_sum(double a, double b, double c) {
  const double product = a * b;
  const double sum = product + c;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  const bool inexact = error < 0 || error > 0;  // false for NaN: infinities stay
  const bool towards_zero = (error < 0) != (sum < 0);
  // An odd last bit already marks the sum as inexact.
  const uint64_t odd = towards_zero ? bits - 1 : bits + 1;
  return std::bit_cast<double>(inexact && (bits & 1) == 0 ? odd : bits);
}

/// fma in float, with one rounding.
inline float fma_f32(float a, float b, float c) {
  return static_cast<float>(exact_product_sum(a, b, c));
}

}  // namespace dsv4::amd::isa
