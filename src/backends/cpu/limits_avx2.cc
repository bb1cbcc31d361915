#include "backends/cpu/limits.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace dsv4::cpu {

float peak_f32_avx2(int64_t iterations) {
  __m256 chains[kPeakChains];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) chains[i] = _mm256_setzero_ps();
  __m256 x = _mm256_set1_ps(0.5f);
  asm volatile("" : "+x"(x));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i)
      asm volatile("vfmadd231ps %1, %1, %0" : "+x"(chains[i]) : "x"(x));
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) sum += _mm256_cvtss_f32(chains[i]);
  return sum;
}

}  // namespace dsv4::cpu
#endif
