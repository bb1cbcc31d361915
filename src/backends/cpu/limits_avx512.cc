#include "backends/cpu/limits.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace dsv4::cpu {

float peak_f32_avx512(int64_t iterations) {
  __m512 chains[kPeakChains];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) chains[i] = _mm512_setzero_ps();
  __m512 x = _mm512_set1_ps(0.5f);
  asm volatile("" : "+v"(x));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i)
      asm volatile("vfmadd231ps %1, %1, %0" : "+v"(chains[i]) : "v"(x));
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) sum += _mm512_cvtss_f32(chains[i]);
  return sum;
}

uint64_t read_stream_avx512(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i < bytes; i += 256) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(p + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(p + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(p + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(p + i + 192));
  }
  a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(a)));
}

}  // namespace dsv4::cpu
#endif
