// Weights and index keys as stored -> bf16 operands of matrix instructions, exactly: codes of E4M3
// and E2M1 are bf16 numbers. Their scales are applied to sums of products, in float; `expand` may
// give numbers kUnit times smaller, which belongs into the scale.
//
// A piece is what a lane holds of 32 columns of a row: quad q = lane / 16 of the wave has the eight
// columns from 8 q on. The other operand, bf16, is dealt alike.
#pragma once
#if !defined(__HIP__)
#include <array>
#endif

#include "backends/amd/instructions.h"
#include "backends/amd/mfma.h"
#include "backends/amd/wave.h"
#include "backends/gpu/numbers.h"
#include "dsv4/dtype.h"

namespace dsv4::amd {

constexpr int kPieceCols = 32;
constexpr int kLaneCols = 8;

/// First column of a lane's share of a piece.
DSV4_DEVICE int lane_col() {
  return wave_lane() / 16 * kLaneCols;
}

// ---- a pair of codes to a pair of bf16 by one step: gfx950 by an instruction, the executor by
// tables

#if defined(__HIP__) && !defined(__gfx950__)

constexpr bool kConvertsPairs = false;
template <bool kUpper>
DSV4_DEVICE uint32_t e4m3_to_bf16_pair(uint32_t) {
  return 0;
}
template <int kByte>
DSV4_DEVICE uint32_t e2m1_to_bf16_pair(uint32_t) {
  return 0;
}

#elif defined(__HIP__)

constexpr bool kConvertsPairs = true;
template <bool kUpper>
DSV4_DEVICE uint32_t e4m3_to_bf16_pair(uint32_t codes) {
  return std::bit_cast<uint32_t>(
      __builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(static_cast<int>(codes), 1.0f, kUpper));
}
template <int kByte>
DSV4_DEVICE uint32_t e2m1_to_bf16_pair(uint32_t codes) {
  return std::bit_cast<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, 1.0f, kByte));
}

#else

constexpr bool kConvertsPairs = true;

namespace tables {
/// bf16 of a code with `mantissa_bits` below its exponent, whose smallest normal is 2^(1 - bias).
constexpr uint16_t bf16_of(int code, int mantissa_bits, int bias) {
  const int steps = 1 << mantissa_bits, exponent = code / steps;
  float value = static_cast<float>(code % steps + (exponent > 0 ? steps : 0));
  int power = (exponent > 0 ? exponent : 1) - bias - mantissa_bits;
  for (; power > 0; --power) value *= 2.0f;
  for (; power < 0; ++power) value *= 0.5f;
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
inline constexpr auto kE4m3 = [] {
  std::array<uint16_t, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int size = code & 0x7f;
    const int bits = size == 0x7f ? 0x7fc0 : bf16_of(size, 3, 7);
    table[static_cast<size_t>(code)] = static_cast<uint16_t>(bits | (code & 0x80) << 8);
  }
  return table;
}();
inline constexpr auto kE2m1Pairs = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t pair = 0; pair < 256; ++pair) {
    const auto one = [](uint32_t code) {
      return bf16_of(static_cast<int>(code & 7), 1, 1) | (code & 8) << 12;
    };
    table[pair] = one(pair & 15) | one(pair >> 4) << 16;
  }
  return table;
}();
}  // namespace tables

template <bool kUpper>
uint32_t e4m3_to_bf16_pair(uint32_t codes) {
  const uint32_t pair = kUpper ? codes >> 16 : codes;
  return tables::kE4m3[pair & 0xff] | uint32_t{tables::kE4m3[pair >> 8 & 0xff]} << 16;
}
template <int kByte>
uint32_t e2m1_to_bf16_pair(uint32_t codes) {
  return tables::kE2m1Pairs[codes >> (8 * kByte) & 0xff];
}

#endif

/// 2^(byte - 127) without a branch: byte 0 is a subnormal and 255 NaN, both by the same bit.
DSV4_DEVICE float scale_of(uint32_t byte) {
  const uint32_t first_or_last = (((byte + 1) & 0xffu) - 2) >> 9 & 0x00400000u;
  return gpu::float_of(byte << 23 | first_or_last);
}

// ---- formats

template <DType kDType>
struct Codes;

template <>
struct Codes<DType::kBf16> {
  static constexpr int kLaneBytes = 16;
  static constexpr int kScaleCols = 0;  // none
  static constexpr float kUnit = 1.0f;
  using Words = gpu::Words<4>;
  DSV4_DEVICE static Bf16x8 expand(const Words& words) { return words; }
};

template <>
struct Codes<DType::kF8E4M3> {
  static constexpr int kLaneBytes = 8;
  static constexpr int kScaleCols = 128;  // columns that share a scale, at least
  using Words = gpu::Words<2>;
  // The code NaN counts as 480 where the chip reads FNUZ codes.
  static constexpr float kUnit = OcpCodes::kUnit;
  DSV4_DEVICE static Bf16x8 expand(const Words& words) {
    Bf16x8 out;
    DSV4_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (kConvertsPairs) {
        out.word[2 * i] = e4m3_to_bf16_pair<false>(words.word[i]);
        out.word[2 * i + 1] = e4m3_to_bf16_pair<true>(words.word[i]);
      } else {
        const uint32_t codes = OcpCodes::of(words.word[i]);
        out.word[2 * i] = cut_to_bf16(OcpCodes::pair<false>(codes));
        out.word[2 * i + 1] = cut_to_bf16(OcpCodes::pair<true>(codes));
      }
    }
    return out;
  }
};

template <>
struct Codes<DType::kF4E2M1> {
  static constexpr int kLaneBytes = 4;
  static constexpr int kScaleCols = 32;
  using Words = gpu::Words<1>;
  static constexpr float kUnit = 1.0f;
  DSV4_DEVICE static Bf16x8 expand(const Words& words) {
    const uint32_t codes = words.word[0];
    if constexpr (kConvertsPairs) {
      return {e2m1_to_bf16_pair<0>(codes), e2m1_to_bf16_pair<1>(codes), e2m1_to_bf16_pair<2>(codes),
              e2m1_to_bf16_pair<3>(codes)};
    }
    // Upper and lower bytes of the bf16 numbers 0, 0.5, 1, 1.5 and 2, 3, 4, 6 are looked up by byte
    // permutations whose selectors are the codes: of even columns, of odd ones.
    const uint32_t even = codes & 0x07070707u, odd = codes >> 4 & 0x07070707u;
    const uint32_t even_upper =
        permute_bytes(0x40404040u, 0x3f3f3f00u, even) | (codes << 4 & 0x80808080u);
    const uint32_t odd_upper = permute_bytes(0x40404040u, 0x3f3f3f00u, odd) | (codes & 0x80808080u);
    const uint32_t even_lower = permute_bytes(0xc0804000u, 0xc0800000u, even);
    const uint32_t odd_lower = permute_bytes(0xc0804000u, 0xc0800000u, odd);
    // Columns 0 and 2, 4 and 6; 1 and 3, 5 and 7.
    const uint32_t even_01 = permute_bytes(even_upper, even_lower, 0x05010400u);
    const uint32_t even_23 = permute_bytes(even_upper, even_lower, 0x07030602u);
    const uint32_t odd_01 = permute_bytes(odd_upper, odd_lower, 0x05010400u);
    const uint32_t odd_23 = permute_bytes(odd_upper, odd_lower, 0x07030602u);
    return {join_lower(even_01, odd_01), join_upper(even_01, odd_01), join_lower(even_23, odd_23),
            join_upper(even_23, odd_23)};
  }
};

}  // namespace dsv4::amd
