// Rounding to E4M3 and E2M1 as values, and the power-of-two scales (numerics.md 2-3). The scalar
// definitions are in core/numbers.h; rowwise_test compares them.
#pragma once
#include "backends/cpu/ops/vector-inl.h"
#include "core/numbers.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

struct Scale {
  float value;    // 2^e, or NaN where the group holds a NaN or infinity: the fault stays visible
  float inverse;  // 2^-e
};

DSV4_INLINE Scale scale_for(float amax, float floor, float qmax) {
  if ((std::bit_cast<uint32_t>(amax) & 0x7f800000u) == 0x7f800000u) {
    const float nan = std::bit_cast<float>(0x7fc00000u);
    return {nan, nan};
  }
  const int exponent = ceil_log2_ratio(amax < floor ? floor : amax, qmax);
  return {exp2_int(exponent), exp2_int(-exponent)};
}
DSV4_INLINE Scale e4m3_scale(float amax, float floor) {
  return scale_for(amax, floor, kE4m3Max);
}

/// Nearest-even value of E4M3FN, saturating at 448; NaN stays NaN.
DSV4_INLINE Floats round_to_e4m3(const Floats& x) {
  const Floats size = min(broadcast(kE4m3Max), magnitude(x));
  // Normal numbers: drop 20 mantissa bits. Below 2^-6 the grid is 2^-9, the spacing of floats at
  // 2^14: an addition rounds to it.
  const Bits bits = bits_of(size);
  const Floats normal =
      floats_of((bits + broadcast_bits(0x7ffffu) + ((bits >> 20) & broadcast_bits(1))) &
                broadcast_bits(0xfff00000u));
  const Floats subnormal = (size + broadcast(0x1p14f)) - broadcast(0x1p14f);
  const Floats value = select(size < broadcast(0x1p-6f), subnormal, normal);
  return select(is_nan(x), x, with_sign(value, x));
}

/// Nearest-even value of E2M1, saturating at 6; NaN stays NaN. Grid 0.5 below 2, 1 below 4, else 2:
/// the spacings of floats at 2^22, 2^23 and 2^24.
DSV4_INLINE Floats round_to_e2m1(const Floats& x) {
  const Floats size = min(broadcast(kE2m1Max), magnitude(x));
  const Floats offset =
      select(size < broadcast(2.0f), broadcast(0x1p22f),
             select(size < broadcast(4.0f), broadcast(0x1p23f), broadcast(0x1p24f)));
  return select(is_nan(x), x, with_sign((size + offset) - offset, x));
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
