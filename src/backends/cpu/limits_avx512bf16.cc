#include "backends/cpu/limits.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace dsv4::cpu {

float peak_bf16_avx512bf16(int64_t iterations) {
  __m512 chains[kPeakChains];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) chains[i] = _mm512_setzero_ps();
  __m512i x = _mm512_set1_epi16(0x3f00);
  asm volatile("" : "+v"(x));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i)
      asm volatile("vdpbf16ps %1, %1, %0" : "+v"(chains[i]) : "v"(x));
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) sum += _mm512_cvtss_f32(chains[i]);
  return sum;
}

}  // namespace dsv4::cpu
#endif
