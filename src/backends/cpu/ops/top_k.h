// A number below the best of many scores: what the selection and the bounds of scores begin with.
#pragma once
#include <cstdint>

namespace dsv4::cpu {

constexpr int kCutoffBins = 2048;

/// A finite number that at least `wanted` of every `step`-th of n scores reach, if so many are
/// above -inf, and not many more: it has 22 bits of the last of them. bins: scratch [kCutoffBins].
float cutoff_of(const float* scores, int64_t n, int64_t step, int64_t wanted, uint32_t* bins);

/// A cutoff that a sample of n scores says more than k of them reach, about twice as many.
float sampled_cutoff(const float* scores, int64_t n, int64_t k, uint32_t* bins);

}  // namespace dsv4::cpu
