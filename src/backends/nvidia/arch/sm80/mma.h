// Arithmetic of sm_80 and later, one instruction per function (PTX ISA 9.0, section in brackets).
#pragma once
#include <cstdint>

namespace dsv4::nvidia::sm80 {

/// d += a b, 16 x 8 x 16 in bf16 with f32 sums [9.7.14.5, m16n8k16]. Lane (g, t) = (lane / 4, lane
/// % 4) holds a = (row g, k 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), pairs each; b =
/// (k 2t.., column g), (2t + 8.., g); d = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Both halves: a b as bf16, subnormals kept [9.7.4.3: fma with -0].
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
}

/// The larger; NaN where one of them is [9.7.3.12].
__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

}  // namespace dsv4::nvidia::sm80
