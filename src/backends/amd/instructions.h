// Instructions of AMD GPUs beside those of mfma.h, one function each, with what the executor does
// in their place; and E4M3 codes, which the two chips read differently.
#pragma once
#include "backends/gpu/math.h"

namespace dsv4::amd {

/// Two floats: products of pairs are one instruction.
using FloatPair = float __attribute__((vector_size(8)));

// ---- platform
// -----------------------------------------------------------------------------------

#if defined(__HIP__)

/// A value that is the same in all lanes of the wave, in a scalar register: branches on it are
/// branches, not masks.
DSV4_DEVICE int uniform(int value) {
  return __builtin_amdgcn_readfirstlane(value);
}
/// 2^x and log2 x within 1 ulp; denormal results and arguments count as 0.
DSV4_DEVICE float exp2_approx(float x) {
  return __builtin_amdgcn_exp2f(x);
}
DSV4_DEVICE float log2_approx(float x) {
  return __builtin_amdgcn_logf(x);
}
/// Byte i of the result is byte (selector >> 8 i & 7) of the eight bytes (high, low).
DSV4_DEVICE uint32_t permute_bytes(uint32_t high, uint32_t low, uint32_t selector) {
  return __builtin_amdgcn_perm(high, low, selector);
}

/// 16 bytes at a multiple of 4, or one byte, of global memory: of a pointer that was kept in shared
/// memory the compiler does not know that.
DSV4_DEVICE gpu::Words<4> load_global_16(const void* from) {
  using Aligned4 = uint32_t __attribute__((vector_size(16), aligned(4)));
  using Global = const __attribute__((address_space(1))) Aligned4;
  const Aligned4 words = *(Global*)from;
  return {words[0], words[1], words[2], words[3]};
}
DSV4_DEVICE uint32_t load_global_byte(const uint8_t* from) {
  return *(const __attribute__((address_space(1))) uint8_t*)from;
}

namespace platform {
// Of a compute unit.
#if defined(__gfx950__)
constexpr bool kFnuz = false;
constexpr int kSharedBytes = 160 * 1024;
#else
constexpr bool kFnuz = true;
constexpr int kSharedBytes = 64 * 1024;
#endif
/// The lower or upper two codes of a word as the chip reads them.
template <bool kUpper>
DSV4_DEVICE FloatPair e4m3_pair(uint32_t codes) {
  const auto pair = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), kUpper);
  return FloatPair{pair[0], pair[1]};
}
}  // namespace platform

#else

inline int uniform(int value) {
  return value;
}
inline float exp2_approx(float x) {
  return std::exp2(x);
}
inline float log2_approx(float x) {
  return std::log2(x);
}
inline uint32_t permute_bytes(uint32_t high, uint32_t low, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (8 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

inline gpu::Words<4> load_global_16(const void* from) {
  gpu::Words<4> out;
  __builtin_memcpy(&out, __builtin_assume_aligned(from, 4), sizeof out);
  return out;
}
inline uint32_t load_global_byte(const uint8_t* from) {
  return *from;
}

namespace platform {
constexpr bool kFnuz = false;
constexpr int kSharedBytes = 64 * 1024;
template <bool kUpper>
FloatPair e4m3_pair(uint32_t codes) {
  const uint32_t pair = kUpper ? codes >> 16 : codes;
  return FloatPair{gpu::e4m3_to_float(pair & 0xff), gpu::e4m3_to_float(pair >> 8 & 0xff)};
}
}  // namespace platform

#endif

// ---- pairs of 16-bit halves

/// The lower halves of two words, or their upper halves: two floats cut to bf16.
DSV4_DEVICE uint32_t join_lower(uint32_t even, uint32_t odd) {
  return permute_bytes(odd, even, 0x05040100);
}
DSV4_DEVICE uint32_t join_upper(uint32_t even, uint32_t odd) {
  return permute_bytes(odd, even, 0x07060302);
}
/// Exact for E4M3 values times powers of two.
DSV4_DEVICE uint32_t cut_to_bf16(FloatPair pair) {
  return join_upper(gpu::bits_of(pair[0]), gpu::bits_of(pair[1]));
}

// ---- OCP E4M3 on chips that read FNUZ
//
// The FNUZ value of a code is half of OCP's, but 0x80 (OCP -0) is its only NaN, and OCP's NaNs 0x7f
// and 0xff are numbers. Source: spec/cache_layouts.md 1.

constexpr uint32_t kE4m3Magnitudes = 0x7f7f7f7f;

/// Codes without -0.
DSV4_DEVICE uint32_t without_minus_zero(uint32_t codes) {
  // A magnitude carries into the sign's place unless it is zero.
  const uint32_t not_zero = (codes & kE4m3Magnitudes) + kE4m3Magnitudes;
  return (codes & kE4m3Magnitudes) | (codes & not_zero & ~kE4m3Magnitudes);
}
/// Nonzero in bits of 0x80808080 where a code is NaN.
DSV4_DEVICE uint32_t nan_codes(uint32_t codes) {
  return (codes & kE4m3Magnitudes) + 0x01010101u;
}

/// E4M3 codes as kernels read them: `of` prepares a word of OCP codes once; `pair` and `bf16_pair`
/// give values that are kUnit times smaller. NaN codes are numbers where kHidesNan.
struct OcpCodes {
  static constexpr bool kHidesNan = platform::kFnuz;
  static constexpr float kUnit = platform::kFnuz ? 2.0f : 1.0f;
  DSV4_DEVICE static uint32_t of(uint32_t codes) {
    return platform::kFnuz ? without_minus_zero(codes) : codes;
  }
  template <bool kUpper>
  DSV4_DEVICE static FloatPair pair(uint32_t codes) {
    return platform::e4m3_pair<kUpper>(codes);
  }
  template <bool kUpper>
  DSV4_DEVICE static uint32_t bf16_pair(uint32_t codes) {
#if defined(__gfx950__)
    return std::bit_cast<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(codes, 1.0f, kUpper));
#else
    return cut_to_bf16(pair<kUpper>(codes));
#endif
  }
};

}  // namespace dsv4::amd
