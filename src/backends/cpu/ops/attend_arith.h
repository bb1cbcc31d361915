// The scalar arithmetic of attention and indexer scores: what one lane of every candidate computes.
// The reference candidates are written with it; the vector ones agree with it bit for bit.
//
// Rule for every operation here: binary32, nearest-even, one rounding per operation (fma where
// written), and subnormal inputs and results count as zero of the same sign. That is what
// VDPBF16PS does by definition; vector code gets it for all other operations from MXCSR
// (FlushSubnormals).
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsv4::cpu {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

/// 2^f = 1 + f * (kExp2[0] + f * (kExp2[1] + ...)) on [-0.5, 0.5]: degree 6 minimax of the relative
/// error with the constant term fixed at 1 (so that 2^0 = 1), 2.6e-9 before rounding.
inline constexpr float kExp2[6] = {0x1.62e432p-1f, 0x1.ebfbe2p-3f,  0x1.c6ae72p-5f,
                                   0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f};

inline float flush(float value) {
  return std::fabs(value) < kSmallestNormal ? std::copysign(0.0f, value) : value;
}
inline float add_flushed(float a, float b) {
  return flush(flush(a) + flush(b));
}
inline float mul_flushed(float a, float b) {
  return flush(flush(a) * flush(b));
}

/// a * b + c with one rounding.
inline float fma_flushed(float a, float b, float c) {
  a = flush(a), b = flush(b), c = flush(c);
  const float result = std::fma(a, b, c);
  // The hardware decides "subnormal" after rounding to 24 bits with unbounded exponent: a value a
  // quarter step below 2^-126 is flushed although fma rounds it up to 2^-126.
  if (std::fabs(result) == kSmallestNormal) {
    const double exact = static_cast<double>(a) * b + c;
    if (std::fabs(exact) < 0x1p-126 - 0x1p-151) return std::copysign(0.0f, result);
  }
  return flush(result);
}

/// One lane of VDPBF16PS: the odd product is added first.
inline float dot_pair(float acc, float a_even, float a_odd, float b_even, float b_odd) {
  return fma_flushed(a_even, b_even, fma_flushed(a_odd, b_odd, acc));
}

/// Larger of two as MAXPS has it: the second one when they do not compare.
inline float max_lane(float a, float b) {
  return a > b ? a : b;
}

/// 2^x for x <= 127; below 2^-126 it is 0; NaN stays NaN. Each step rounds once.
inline float exp2_flushed(float x) {
  if (std::isnan(x)) return x;
  if (x < -126.0f) return 0.0f;
  const float n = std::nearbyint(x);
  const float f = x - n;
  float p = kExp2[5];
  for (int i = 4; i >= 0; --i) p = std::fma(p, f, kExp2[i]);
  p = std::fma(p, f, 1.0f);
  return p * exp2_int(static_cast<int>(n));
}

/// Rounding of a result to bf16 (VCVTNEPS2BF16): nearest-even, subnormals to zero.
inline uint16_t bf16_flushed(float value) {
  return f32_to_bf16(flush(value));
}

/// softmax_scale in the base-2 domain, rounded once.
inline float log2_scale(float softmax_scale) {
  return static_cast<float>(static_cast<double>(softmax_scale) * kLog2E);
}

/// Weights with which two partial softmaxes (maximum, sum) are merged; both have seen keys.
struct MergeWeights {
  float max, sum, total, chain;
};
inline MergeWeights merge_weights(float max_total, float sum_total, float max_chain,
                                  float sum_chain) {
  const float max = max_lane(max_total, max_chain);
  const float total = exp2_flushed(max_total - max), chain = exp2_flushed(max_chain - max);
  return {max, fma_flushed(sum_chain, chain, mul_flushed(sum_total, total)), total, chain};
}

/// Factor of the accumulated values: 1 / (sum + 2^(sink - max)). `max` and `sum` are in the base-2
/// domain, `sink` is a natural logit. An infinite sink takes everything.
inline float inverse_denominator(float max, float sum, float sink) {
  if (sink == kMinusInfinity) return flush(1.0f / sum);
  const float exponent = static_cast<float>(static_cast<double>(sink) * kLog2E - max);
  if (exponent >= 127.0f) return 0.0f;  // 2^127 against a sum of at most 2^31 rows
  return flush(1.0f / add_flushed(sum, exp2_flushed(exponent)));
}

/// Natural log of the sum of exponentials, without the sink.
inline float log_sum_exp(float max, float sum) {
  return static_cast<float>(static_cast<double>(max) * kLn2 + std::log(static_cast<double>(sum)));
}

/// Largest scale q.k of a base-2 maximum.
inline float natural_max(float max) {
  return static_cast<float>(static_cast<double>(max) * kLn2);
}

/// While it lives, the thread's vector arithmetic treats subnormals as zero: MXCSR.FTZ and DAZ.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ | 0x8040u);
  }
  ~FlushSubnormals() {
    _mm_setcsr(saved_);
  }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace dsv4::cpu
