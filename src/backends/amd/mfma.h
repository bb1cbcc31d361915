// Matrix instructions of AMD GPUs, one function each: D = A B + C over the 64 lanes of a wave. On a
// GPU the compiler's builtin, in the executor the same product with the published register layout.
// Every lane of the wave must take part.
//
// Layout of 16 x 16 results with KPL values of k a lane (AMD's matrix instruction calculator; for
// the forms of gfx950 with twice the k the same formula, unchecked on hardware):
//   A        row = lane % 16,    k = KPL * (lane / 16) + j for value j of the lane
//   B        column = lane % 16, k as in A
//   C and D  column = lane % 16, row = 4 * (lane / 16) + i for register i
// The values of k may be dealt to lanes in any other way, if A and B are dealt alike.
//
// Sums: in the executor products are exact and k ascends, in float, from C. The order inside the
// hardware's instruction is not documented.
#pragma once
#include <cstddef>

#include "backends/gpu/platform.h"

namespace dsv4::amd {

/// A lane's part of a 16 x 16 f32 tile.
using F32x4 = float __attribute__((vector_size(16)));

/// A lane's part of an operand: 4 or 8 bf16 in ascending k, the first in the lowest bits; 8 FP8
/// codes.
using Bf16x4 = gpu::Words<2>;
using Bf16x8 = gpu::Words<4>;
using Fp8x8 = gpu::Words<2>;

#if defined(__HIP__)

namespace mfma {
// Types of the builtins.
using Short4 = short __attribute__((vector_size(8)));
using Bf16Vector8 = __bf16 __attribute__((ext_vector_type(8)));
}  // namespace mfma

DSV4_DEVICE F32x4 mfma_16x16x16_bf16(Bf16x4 a, Bf16x4 b, F32x4 c) {
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(std::bit_cast<mfma::Short4>(a),
                                                   std::bit_cast<mfma::Short4>(b), c, 0, 0, 0);
}

/// One instruction on gfx950; on gfx942 two of half the k: the lower four values of every lane,
/// then the upper four.
DSV4_DEVICE F32x4 mfma_16x16x32_bf16(Bf16x8 a, Bf16x8 b, F32x4 c) {
#if defined(__gfx950__)
  return __builtin_amdgcn_mfma_f32_16x16x32_bf16(std::bit_cast<mfma::Bf16Vector8>(a),
                                                 std::bit_cast<mfma::Bf16Vector8>(b), c, 0, 0, 0);
#else
  c = mfma_16x16x16_bf16({a.word[0], a.word[1]}, {b.word[0], b.word[1]}, c);
  return mfma_16x16x16_bf16({a.word[2], a.word[3]}, {b.word[2], b.word[3]}, c);
#endif
}

#if defined(__gfx950__)
/// OCP E4M3 codes: gfx950 only, the instruction of gfx942 takes other numbers.
DSV4_DEVICE F32x4 mfma_16x16x32_fp8_fp8(Fp8x8 a, Fp8x8 b, F32x4 c) {
  return __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(std::bit_cast<long>(a), std::bit_cast<long>(b),
                                                    c, 0, 0, 0);
}
#endif

/// All lanes of the wave; orders shared memory among them.
DSV4_DEVICE void wave_sync() {
  gpu::group_sync();
}

#elif !defined(__CUDACC__)

namespace mfma {

template <int kWords>
struct Inputs {
  gpu::Words<kWords> a, b;
  F32x4 c;
};

inline float bf16_of(const void* operand, int j) {
  uint16_t bits;
  __builtin_memcpy(&bits, static_cast<const std::byte*>(operand) + 2 * j, sizeof bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
inline float fp8_of(const void* operand, int j) {
  const auto code = std::to_integer<uint32_t>(static_cast<const std::byte*>(operand)[j]);
  const uint32_t size = code & 0x7f;
  const float value = std::bit_cast<float>(size << 20) * 0x1p120f;
  if (size == 0x7f) return std::bit_cast<float>(0x7fc00000u);
  return (code & 0x80) != 0 ? -value : value;
}

// The wave's product. A lane holds kRuns runs of kPerRun values; all lanes' first runs are summed
// before their second ones.
template <typename In, int kPerRun, int kRuns, float (*kValue)(const void*, int)>
void multiply(const std::byte* in, std::byte* out, int) {
  constexpr int kDepth = 4 * kPerRun * kRuns;
  alignas(64) float a[kDepth][16], b[kDepth][16], d[16][16];
  for (int lane = 0; lane < 64; ++lane) {
    In lane_in;
    __builtin_memcpy(&lane_in, in + lane * gpu::executor::kExchangeBytes, sizeof lane_in);
    for (int j = 0; j < kPerRun * kRuns; ++j) {
      const int k = kPerRun * (4 * (j / kPerRun) + lane / 16) + j % kPerRun;
      a[k][lane % 16] = kValue(&lane_in.a, j);
      b[k][lane % 16] = kValue(&lane_in.b, j);
    }
    for (int i = 0; i < 4; ++i) d[4 * (lane / 16) + i][lane % 16] = lane_in.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int col = 0; col < 16; ++col) d[row][col] = d[row][col] + a[k][row] * b[k][col];
    }
  }
  for (int lane = 0; lane < 64; ++lane) {
    F32x4 lane_out;
    for (int i = 0; i < 4; ++i) lane_out[i] = d[4 * (lane / 16) + i][lane % 16];
    __builtin_memcpy(out + lane * gpu::executor::kExchangeBytes, &lane_out, sizeof lane_out);
  }
}

template <int kPerRun, int kRuns, float (*kValue)(const void*, int), int kWords>
F32x4 exchange(const char* name, gpu::Words<kWords> a, gpu::Words<kWords> b, F32x4 c) {
  const Inputs<kWords> in{a, b, c};
  F32x4 out;
  gpu::executor::exchange(64, {name, 0, multiply<Inputs<kWords>, kPerRun, kRuns, kValue>}, &in,
                          sizeof in, &out, sizeof out);
  return out;
}

}  // namespace mfma

inline F32x4 mfma_16x16x16_bf16(Bf16x4 a, Bf16x4 b, F32x4 c) {
  return mfma::exchange<4, 1, mfma::bf16_of>("mfma_16x16x16_bf16", a, b, c);
}
/// The sums of gfx942.
inline F32x4 mfma_16x16x32_bf16(Bf16x8 a, Bf16x8 b, F32x4 c) {
  return mfma::exchange<4, 2, mfma::bf16_of>("mfma_16x16x32_bf16", a, b, c);
}
/// OCP E4M3 codes, as on gfx950.
inline F32x4 mfma_16x16x32_fp8_fp8(Fp8x8 a, Fp8x8 b, F32x4 c) {
  return mfma::exchange<8, 1, mfma::fp8_of>("mfma_16x16x32_fp8_fp8", a, b, c);
}
inline void wave_sync() {
  gpu::executor::lane_sync(64);
}

#endif

}  // namespace dsv4::amd
