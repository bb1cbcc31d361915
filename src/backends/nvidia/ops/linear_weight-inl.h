// Weights as stored -> bf16 pairs in registers, exactly: E4M3 and E2M1 codes times a power of two
// are bf16 numbers. Included by kernels only.
//
// 16 bytes of a row are one lane's share of a chunk of K. They hold kLaneCols columns in pieces of
// 8; expand() makes the four bf16 pairs of a piece, the operands of two matrix instructions.
#pragma once
#include <cstdint>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "dsv4/dtype.h"

namespace dsv4::nvidia {

template <DType kDType>
struct Format;

template <>
struct Format<DType::kBf16> {
  static constexpr int kLaneCols = 8;
  static constexpr bool kScaled = false;
  struct Factor {};
  __device__ static __forceinline__ Factor factor(uint32_t /*byte*/) { return {}; }
  __device__ static __forceinline__ void expand(const uint4& codes, int /*piece*/, const Factor&,
                                                uint32_t (&pairs)[4]) {
    pairs[0] = codes.x, pairs[1] = codes.y, pairs[2] = codes.z, pairs[3] = codes.w;
  }
};

/// Both halves the same bf16.
__device__ __forceinline__ uint32_t twice(uint32_t bf16) {
  return bf16 << 16 | bf16;
}
__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
/// Bytes (low0, high0, low1, high1) and (low2, high2, low3, high3).
__device__ __forceinline__ uint32_t interleave_low(uint32_t low, uint32_t high) {
  return sm80::permute_bytes(low, high, 0x5140);
}
__device__ __forceinline__ uint32_t interleave_high(uint32_t low, uint32_t high) {
  return sm80::permute_bytes(low, high, 0x7362);
}

template <>
struct Format<DType::kF8E4M3> {
  static constexpr int kLaneCols = 16;
  static constexpr bool kScaled = true;
  // A code's seven bits at bits 10..4 of a bf16 are the number times 2^-120, subnormal codes
  // included; one product undoes that and applies the scale 2^(byte - 127). The exponent of the
  // factor fits up to byte 134, larger scales take a second product. The code NaN counts as 480.
  static constexpr uint32_t kLargestByte = 134;
  struct Factor {
    uint32_t first, rest;
    bool large;
  };
  __device__ static __forceinline__ Factor factor(uint32_t byte) {
    const uint32_t first = min(byte, kLargestByte);
    return {byte == 255 ? 0x7fc07fc0u : twice((first + 120) << 7), twice((byte - first + 127) << 7),
            byte > kLargestByte && byte < 255};
  }
  /// Without factor.rest.
  __device__ static __forceinline__ void expand_first(const uint4& codes, int piece,
                                                      const Factor& factor, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Each byte and 8 times its sign; shifted, the code's bits are where a bf16 has them.
      const uint32_t word = word_of(codes, 2 * piece + i);
      const uint32_t low = sm80::permute_bytes(word, 0, 0x9180) << 4 & 0x87f087f0u;
      const uint32_t high = sm80::permute_bytes(word, 0, 0xb3a2) << 4 & 0x87f087f0u;
      pairs[2 * i] = sm80::multiply_bf16x2(low, factor.first);
      pairs[2 * i + 1] = sm80::multiply_bf16x2(high, factor.first);
    }
  }
  template <int kCount>
  __device__ static __forceinline__ void apply_rest(const Factor& factor,
                                                    uint32_t (&pairs)[kCount]) {
#pragma unroll
    for (uint32_t& pair : pairs) pair = sm80::multiply_bf16x2(pair, factor.rest);
  }
  __device__ static __forceinline__ void expand(const uint4& codes, int piece, const Factor& factor,
                                                uint32_t (&pairs)[4]) {
    expand_first(codes, piece, factor, pairs);
    if (factor.large) apply_rest(factor, pairs);
  }
};

template <>
struct Format<DType::kF4E2M1> {
  static constexpr int kLaneCols = 32;
  static constexpr bool kScaled = true;
  struct Factor {
    uint32_t scale;
  };
  __device__ static __forceinline__ Factor factor(uint32_t byte) {
    return {twice(byte == 255 ? 0x7fc0u : byte == 0 ? 0x0040u : byte << 7)};
  }
  // High and low bytes of the bf16 numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 are looked up by byte
  // permutations, whose selectors are the codes themselves.
  __device__ static __forceinline__ void expand(const uint4& codes, int piece, const Factor& factor,
                                                uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t four = word_of(codes, piece) >> (16 * i);
      const uint32_t magnitude = four & 0x7777u;
      // Selectors with the top bit set repeat the sign of the byte: 0xff for negative codes, 0x80
      // for the others; shifted by one, the top bit is the code's sign.
      const uint32_t sign = sm80::permute_bytes(0x80808080u, 0x80808080u, four) << 1;
      const uint32_t high =
          sm80::permute_bytes(0x3f3f3f00u, 0x40404040u, magnitude) | (sign & 0x80808080u);
      const uint32_t low = sm80::permute_bytes(0xc0800000u, 0xc0804000u, magnitude);
      pairs[2 * i] = sm80::multiply_bf16x2(interleave_low(low, high), factor.scale);
      pairs[2 * i + 1] = sm80::multiply_bf16x2(interleave_high(low, high), factor.scale);
    }
  }
};

/// sums += the products of 8 columns of each of four lanes, in two instructions (`half` 0 and 1);
/// `low` and `high` are the pairs of rows g and g + 8, `x` 8 columns of token g.
__device__ __forceinline__ void multiply_half(float (&sums)[4], const uint32_t (&low)[4],
                                              const uint32_t (&high)[4], const uint4& x, int half) {
  if (half == 0) {
    sm80::mma_bf16(sums, {low[0], high[0], low[1], high[1]}, x.x, x.y);
  } else {
    sm80::mma_bf16(sums, {low[2], high[2], low[3], high[3]}, x.z, x.w);
  }
}

}  // namespace dsv4::nvidia
