// Floating-point functions as the vector unit defines them: minimum and maximum of numbers,
// transcendental functions, and the steps of a division. Denormals are kept unless said otherwise.
// Source: AMD Instinct MI300 instruction set architecture, chapter "Instructions" (VOP1-VOP3).
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace dsv4::amd::isa {

template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
struct FloatFormat {
  using Bits = BitsOf<T>;
  static constexpr int kMantissaBits = sizeof(T) == 8 ? 52 : 23;
  static constexpr Bits kMaxExponent = sizeof(T) == 8 ? 0x7ff : 0xff;
  static constexpr Bits kSign = Bits{1} << (8 * sizeof(T) - 1);
  static constexpr Bits kQuiet = Bits{1} << (kMantissaBits - 1);
};

template <typename T>
inline BitsOf<T> bits_of(T x) {
  return std::bit_cast<BitsOf<T>>(x);
}
/// Biased exponent field.
template <typename T>
inline int exponent_field(T x) {
  return static_cast<int>(bits_of(x) >> FloatFormat<T>::kMantissaBits &
                          FloatFormat<T>::kMaxExponent);
}
template <typename T>
inline bool is_denormal(T x) {
  return x != 0 && exponent_field(x) == 0;
}

/// The smaller number; a NaN only when both are; -0 is less than +0.
template <typename T>
inline T min_number(T a, T b) {
  if (a == b) return std::bit_cast<T>(bits_of(a) | bits_of(b));
  return a < b || b != b ? a : b;
}
template <typename T>
inline T max_number(T a, T b) {
  if (a == b) return std::bit_cast<T>(bits_of(a) & bits_of(b));
  return a > b || b != b ? a : b;
}
template <typename T>
inline T median_number(T a, T b, T c) {
  if (a != a || b != b || c != c) return min_number(min_number(a, b), c);
  return max_number(min_number(a, b), min_number(max_number(a, b), c));
}
/// The smaller number; NaN when either is.
template <typename T>
inline T minimum(T a, T b) {
  return a != a ? a : b != b ? b : min_number(a, b);
}
template <typename T>
inline T maximum(T a, T b) {
  return a != a ? a : b != b ? b : max_number(a, b);
}

inline float flush(float x) {
  return exponent_field(x) == 0 ? std::copysign(0.0f, x) : x;
}

// These flush denormals, of input and of result, in every mode. Accurate to one unit in the last
// place, as documented for the hardware; the bits may differ.
inline float rcp(float x) {
  return flush(1.0f / flush(x));
}
inline float rsq(float x) {
  return flush(static_cast<float>(1.0 / std::sqrt(static_cast<double>(flush(x)))));
}
inline float square_root(float x) {
  return std::sqrt(flush(x));
}
inline float exp2_flushed(float x) {
  return flush(std::exp2(flush(x)));
}
inline float log2_flushed(float x) {
  return std::log2(flush(x));
}
/// sin and cos of x revolutions; outside of +-256 revolutions the angle counts as 0.
inline double revolutions(float x) {
  constexpr double kTwoPi = 6.283185307179586476925;
  if (std::isinf(x)) return std::numeric_limits<double>::quiet_NaN();
  if (std::fabs(x) > 256.0f) return 0;
  const double turns = static_cast<double>(flush(x));
  return (turns - std::nearbyint(turns)) * kTwoPi;
}
inline float sin_revolutions(float x) {
  return static_cast<float>(std::sin(revolutions(x)));
}
inline float cos_revolutions(float x) {
  return static_cast<float>(std::cos(revolutions(x)));
}

/// Fraction in [0, 1): never 1, although x - floor(x) can round to it.
template <typename T>
inline T fract(T x) {
  return min_number(x - std::floor(x), T{1} - std::numeric_limits<T>::epsilon() / 2);
}
template <typename T>
inline T frexp_mantissa(T x) {
  int exponent = 0;
  return std::isfinite(x) ? std::frexp(x, &exponent) : x;
}
template <typename T>
inline int32_t frexp_exponent(T x) {
  int exponent = 0;
  if (std::isfinite(x)) std::frexp(x, &exponent);
  return exponent;
}

/// First step of numerator / denominator: scales `x`, which is one of the two, so that the
/// following steps neither overflow nor lose bits; `undo` says that v_div_fmas must scale back.
template <typename T>
inline T div_scale(T x, T denominator, T numerator, bool* undo) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr int kScale = kDouble ? 128 : 64;
  *undo = false;
  if (numerator == 0 || denominator == 0) return std::numeric_limits<T>::quiet_NaN();
  const bool is_denominator = bits_of(x) == bits_of(denominator);
  const bool is_numerator = bits_of(x) == bits_of(numerator);
  const bool tiny_inverse = is_denormal(T{1} / denominator);
  const bool tiny_quotient = is_denormal(numerator / denominator);
  if (exponent_field(numerator) - exponent_field(denominator) >= (kDouble ? 768 : 96)) {
    *undo = true;
    return is_denominator ? std::ldexp(x, kScale) : x;
  }
  if (is_denormal(denominator)) return std::ldexp(x, kScale);
  if (tiny_inverse && tiny_quotient) {
    *undo = true;
    return is_denominator ? std::ldexp(x, -kScale) : x;
  }
  if (tiny_inverse) return std::ldexp(x, -kScale);
  if (tiny_quotient) {
    *undo = true;
    return is_numerator ? std::ldexp(x, kScale) : x;
  }
  if (exponent_field(numerator) <= (kDouble ? 53 : 23)) return std::ldexp(x, kScale);
  return x;
}

/// Last step: signs and special cases.
template <typename T>
inline T div_fixup(T quotient, T denominator, T numerator) {
  using Format = FloatFormat<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr bool kDouble = sizeof(T) == 8;
  const BitsOf<T> sign = (bits_of(denominator) ^ bits_of(numerator)) & Format::kSign;
  const auto with_sign = [&](T magnitude) { return std::bit_cast<T>(bits_of(magnitude) | sign); };
  if (numerator != numerator) return std::bit_cast<T>(bits_of(numerator) | Format::kQuiet);
  if (denominator != denominator) return std::bit_cast<T>(bits_of(denominator) | Format::kQuiet);
  const bool infinite_n = std::fabs(numerator) == kInfinity;
  const bool infinite_d = std::fabs(denominator) == kInfinity;
  if ((numerator == 0 && denominator == 0) || (infinite_n && infinite_d)) {
    return -std::numeric_limits<T>::quiet_NaN();
  }
  if (denominator == 0 || infinite_n) return with_sign(kInfinity);
  if (infinite_d || numerator == 0) return with_sign(T{0});
  if (exponent_field(numerator) - exponent_field(denominator) < (kDouble ? -1075 : -150)) {
    return with_sign(T{0});
  }
  // Steps that overflowed subtract infinities: the quotient is too large, not undefined.
  if (quotient != quotient) return with_sign(kInfinity);
  return with_sign(std::fabs(quotient));
}

/// One bit of {signaling NaN, quiet NaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal,
/// +inf}.
template <typename T>
inline uint32_t float_class(T x) {
  const bool negative = std::signbit(x);
  if (x != x) return (bits_of(x) & FloatFormat<T>::kQuiet) != 0 ? 2 : 1;
  if (std::isinf(x)) return negative ? 1 << 2 : 1 << 9;
  if (x == 0) return negative ? 1 << 5 : 1 << 6;
  if (is_denormal(x)) return negative ? 1 << 4 : 1 << 7;
  return negative ? 1 << 3 : 1 << 8;
}

}  // namespace dsv4::amd::isa
