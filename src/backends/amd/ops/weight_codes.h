// Weights and index keys as stored -> bf16 operands of matrix instructions, exactly: codes of E4M3
// and E2M1 are bf16 numbers. Their scales are applied to sums of products, in float.
//
// A piece is what a lane holds of 32 columns of a row: quad q = lane / 16 of the wave has the eight
// columns from 8 q on. The other operand, bf16, is dealt alike.
#pragma once
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

/// Two floats that are bf16 numbers, as one word.
DSV4_DEVICE uint32_t join_bf16(float even, float odd) {
  return gpu::bits_of(even) >> 16 | (gpu::bits_of(odd) & 0xffff0000u);
}

template <DType kDType>
struct Codes;

template <>
struct Codes<DType::kBf16> {
  static constexpr int kLaneBytes = 16;
  static constexpr int kScaleCols = 0;  // none
  using Words = gpu::Words<4>;
  DSV4_DEVICE static Bf16x8 expand(const Words& words) { return words; }
};

template <>
struct Codes<DType::kF8E4M3> {
  static constexpr int kLaneBytes = 8;
  static constexpr int kScaleCols = 128;  // columns that share a scale, at least
  using Words = gpu::Words<2>;
  // Seven bits of a code at bits 26..20 of a float are the number times 2^-120. The code NaN counts
  // as 480.
  DSV4_DEVICE static float value(uint32_t word, int byte) {
    const uint32_t top = word << (24 - 8 * byte);
    return gpu::float_of((top & 0x80000000u) | ((top & 0x7f000000u) >> 4)) * 0x1p120f;
  }
  DSV4_DEVICE static Bf16x8 expand(const Words& words) {
    Bf16x8 out;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words.word[i / 2];
      out.word[i] = join_bf16(value(word, i % 2 * 2), value(word, i % 2 * 2 + 1));
    }
    return out;
  }
};

template <>
struct Codes<DType::kF4E2M1> {
  static constexpr int kLaneBytes = 4;
  static constexpr int kScaleCols = 32;
  using Words = gpu::Words<1>;
  // Three bits of a code at bits 24..22 of a float are the number times 2^-126.
  DSV4_DEVICE static float value(uint32_t word, int nibble) {
    const uint32_t top = word << (28 - 4 * nibble);
    return gpu::float_of((top & 0x80000000u) | ((top & 0x70000000u) >> 6)) * 0x1p126f;
  }
  DSV4_DEVICE static Bf16x8 expand(const Words& words) {
    Bf16x8 out;
    DSV4_UNROLL
    for (int i = 0; i < 4; ++i)
      out.word[i] = join_bf16(value(words.word[0], 2 * i), value(words.word[0], 2 * i + 1));
    return out;
  }
};

}  // namespace dsv4::amd
