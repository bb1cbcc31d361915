// Functions of kernels with bounded error, the same bits on every platform (no library is asked).
#pragma once
#include "backends/gpu/numbers.h"

namespace dsv4::gpu {

/// The data as `b`: a NaN there is kept.
DSV4_DEVICE float min(float a, float b) {
  return a < b ? a : b;
}
DSV4_DEVICE float max(float a, float b) {
  return b < a ? a : b;
}

/// e^x = mantissa 2^n for -104 <= x <= 89: n = the low bits of `shifted` as a signed number. x = n
/// ln 2 + r, |r| <= ln 2 / 2; ln 2 is split so that n * kLn2High is exact for |n| < 2^9. The
/// polynomial interpolates (e^r - 1 - r) / r^2 at Chebyshev nodes. The steps of the CPU's row
/// kernels.
struct ExpParts {
  float mantissa;
  uint32_t shifted;  // n + kExpShift
};
constexpr uint32_t kExpShift = 0x4b400000u;
DSV4_DEVICE ExpParts exp_parts(float x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = fma(-n, kLn2High, x) - n * kLn2Low;  // n * kLn2High is exact, fused or not
  float p = 0x1.a124e6p-13f;
  p = p * r + 0x1.6d4318p-10f;
  p = p * r + 0x1.1110ep-7f;
  p = p * r + 0x1.5554eap-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  return {(p * (r * r) + r) + 1.0f, bits_of(shifted)};
}

/// e^x for any x: at most 2 ulp, 0 below -104, inf above 88.73, NaN stays NaN.
DSV4_DEVICE float exp(float x) {
  const ExpParts parts = exp_parts(max(-104.0f, min(89.0f, x)));
  // 2^n in two factors: n reaches from -150 to 128, beyond what one exponent field holds.
  const uint32_t integer = parts.shifted - kExpShift;
  const auto half = static_cast<uint32_t>(static_cast<int32_t>(integer) >> 1);
  const float scale0 = float_of((half + 127) << 23);
  const float scale1 = float_of((integer - half + 127) << 23);
  return (parts.mantissa * scale0) * scale1;
}

/// exp(x) for x <= 0 or NaN: the same bits in six steps less. The first factor, 2^(n + 64), is
/// always normal and its product exact, so that the second one rounds alone.
DSV4_DEVICE float exp_not_positive(float x) {
  const ExpParts parts = exp_parts(max(-104.0f, x));
  static_assert(kExpShift % 512 == 0);
  const uint32_t scale = (parts.shifted << 23) + ((64u + 127u) << 23);
  return (parts.mantissa * float_of(scale)) * 0x1p-64f;
}

/// 1 / (1 + e^-x).
DSV4_DEVICE float sigmoid(float x) {
  return 1.0f / (1.0f + exp(0.0f - x));
}

/// log(1 + z) for 0 <= z <= 1: 2 atanh(s), s = z / (2 + z) <= 1/3; at most 3 ulp.
DSV4_DEVICE float log1p_unit(float z) {
  const float s = z / (2.0f + z);
  const float t = s * s;
  float p = 0x1.f39656p-4f;
  p = p * t + 0x1.b63e16p-4f;
  p = p * t + 0x1.251228p-3f;
  p = p * t + 0x1.999638p-3f;
  p = p * t + 0x1.55555ap-2f;
  const float twice = s + s;
  return twice + twice * (t * p);
}

/// log(1 + e^x), x itself above 20 (model.md 4.1).
DSV4_DEVICE float softplus(float x) {
  const float z = exp(0.0f - magnitude(x));
  const float value = max(0.0f, x) + log1p_unit(z);
  return 20.0f < x ? x : value;
}

struct CosSin {
  float cos, sin;
};

/// Of any |angle| < 2^31: evaluated in double (relative error below 2^-50), then rounded to f32.
/// x = n pi/2 + r with one fused product per part of pi/2, so that nothing is lost where they
/// cancel: pi/2 - kHigh - kLow < 2^-110. The polynomials interpolate (sin r / r - 1) / r^2 and
/// (cos r - 1 + r^2 / 2) / r^4 at Chebyshev nodes of |r| <= pi/4. Kernels that are compiled with
/// contraction call it, too.
DSV4_DEVICE CosSin cos_sin(float angle) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kHigh = 0x1.921fb54442d18p+0, kLow = 0x1.1a62633145c07p-54;
  const auto x = static_cast<double>(angle);
  const double n = nearest(product(x, kTwoOverPi));
  const double r = fma(-n, kLow, fma(-n, kHigh, x));
  const double z = product(r, r);
  double p = 0x1.5e0b190695154p-33;
  p = product(p, z) - 0x1.ae600b00160cap-26;
  p = product(p, z) + 0x1.71de3796878b1p-19;
  p = product(p, z) - 0x1.a01a019e83a8fp-13;
  p = product(p, z) + 0x1.1111111110bb2p-7;
  p = product(p, z) - 0x1.5555555555555p-3;
  const double sine = r + product(r, product(z, p));
  double q = -0x1.907da2754caa9p-37;
  q = product(q, z) + 0x1.1eeb68e7eb073p-29;
  q = product(q, z) - 0x1.27e4fa17d8c71p-22;
  q = product(q, z) + 0x1.a01a019f4eaf1p-16;
  q = product(q, z) - 0x1.6c16c16c16967p-10;
  q = product(q, z) + 0x1.5555555555555p-5;
  const double cosine = 1.0 + product(z, product(z, q) - 0.5);
  const auto quadrant = static_cast<uint32_t>(static_cast<int64_t>(n)) & 3u;
  const double c = (quadrant & 1u) != 0 ? sine : cosine;
  const double s = (quadrant & 1u) != 0 ? cosine : sine;
  return {static_cast<float>(((quadrant + 1u) & 2u) != 0 ? -c : c),
          static_cast<float>((quadrant & 2u) != 0 ? -s : s)};
}

/// angle = f32(position) * frequency rounded to f32, as everywhere (ops.h, RopeView).
DSV4_DEVICE CosSin rope_angle(int32_t position, float frequency) {
  return cos_sin(static_cast<float>(position) * frequency);
}

}  // namespace dsv4::gpu
