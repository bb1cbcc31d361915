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
// No clamp below: a scale of scale_for leaves |x| <= qmax (1 + 2^-22), its two roundings included,
// which rounds to qmax (the next numbers of the grids would be 480 and 8).

/// Nearest-even value of E4M3FN for |x| <= 448 (1 + 2^-22).
DSV4_INLINE Floats round_to_e4m3(const Floats& x) {
  // Normal numbers: drop 20 mantissa bits, the sign bit is not concerned. Below 2^-6 the grid is
  // 2^-9, the spacing of floats at 2^14: an addition rounds to it.
  const Bits bits = bits_of(x);
  const Floats normal =
      floats_of((bits + broadcast_bits(0x7ffffu) + ((bits >> 20) & broadcast_bits(1))) &
                broadcast_bits(0xfff00000u));
  const Floats size = magnitude(x);
  const Floats subnormal = with_sign((size + broadcast(0x1p14f)) - broadcast(0x1p14f), x);
  return select(size < broadcast(0x1p-6f), subnormal, normal);
}

/// Nearest-even value of E2M1 for |x| <= 6 (1 + 2^-22). Grid 0.5 below 2, 1 below 4, else 2: the
/// spacings of floats at 2^22, 2^23 and 2^24.
DSV4_INLINE Floats round_to_e2m1(const Floats& x) {
  const Floats size = magnitude(x);
  const Floats offset =
      select(size < broadcast(2.0f), broadcast(0x1p22f),
             select(size < broadcast(4.0f), broadcast(0x1p23f), broadcast(0x1p24f)));
  return with_sign((size + offset) - offset, x);
}

/// How a group of values is quantised.
struct E4m3 {
  static constexpr float kMax = kE4m3Max;
  static DSV4_INLINE Floats round(const Floats& x) { return round_to_e4m3(x); }
};
struct E2m1 {
  static constexpr float kMax = kE2m1Max;
  static DSV4_INLINE Floats round(const Floats& x) { return round_to_e2m1(x); }
};

template <typename Format, bool kDequantise, typename Lanes, typename T>
DSV4_INLINE void store_quantised(const Floats& x, const Scale& scale, T* out, Lanes lanes) {
  const Floats code = Format::round(x * broadcast(scale.inverse));
  store_exact(out, kDequantise ? code * broadcast(scale.value) : code, lanes);
}

/// The scale of `count` values from `load_at(i, lanes)`, i = 0, 16, ...
template <typename Format, typename LoadAt>
DSV4_INLINE Scale group_scale(LoadAt load_at, int64_t count, float floor) {
  Bits largest = broadcast_bits(0);
  for_vectors(count,
              [&](int64_t i, auto lanes) { largest = max_magnitude(largest, load_at(i, lanes)); });
  return scale_for(max_lane(largest), floor, Format::kMax);
}

/// The rounded values, times the scale when `kDequantise`: exact in bf16. All NaN where the scale
/// is.
template <typename Format, bool kDequantise, typename LoadAt, typename T>
DSV4_INLINE void store_group(LoadAt load_at, int64_t count, const Scale& scale, T* out) {
  if (!(scale.value == scale.value)) {
    for_vectors(count,
                [&](int64_t i, auto lanes) { store(out + i, broadcast(scale.value), lanes); });
    return;
  }
  for_vectors(count, [&](int64_t i, auto lanes) {
    store_quantised<Format, kDequantise>(load_at(i, lanes), scale, out + i, lanes);
  });
}

/// Quantises `count` values from `load_at(i, lanes)`, i = 0, 16, ...: one scale; the rounded
/// values, times the scale when `kDequantise`, go to `out`, exact in bf16. With a NaN or infinity
/// among them all become NaN. Groups of exactly 16 * kVectors values stay in registers between the
/// search for the largest and the rounding. @return the scale.
template <typename Format, int kVectors, bool kDequantise, typename LoadAt, typename T>
DSV4_INLINE float quantise_group(LoadAt load_at, int64_t count, float floor, T* out) {
  if (count == kVectors * kLanes) {
    Floats value[kVectors];
    Bits largest = broadcast_bits(0);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load_at(v * kLanes, Whole{});
      largest = max_magnitude(largest, value[v]);
    }
    const Scale scale = scale_for(max_lane(largest), floor, Format::kMax);
    if (scale.value == scale.value) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        store_quantised<Format, kDequantise>(value[v], scale, out + v * kLanes, Whole{});
      return scale.value;
    }
  }
  Bits largest = broadcast_bits(0);
  for_vectors(count,
              [&](int64_t i, auto lanes) { largest = max_magnitude(largest, load_at(i, lanes)); });
  const Scale scale = scale_for(max_lane(largest), floor, Format::kMax);
  for_vectors(count, [&](int64_t i, auto lanes) {
    if (scale.value == scale.value) {
      store_quantised<Format, kDequantise>(load_at(i, lanes), scale, out + i, lanes);
    } else {
      store(out + i, broadcast(scale.value), lanes);
    }
  });
  return scale.value;
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
