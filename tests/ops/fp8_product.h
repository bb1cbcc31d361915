// What the FP8 tensor cores of sm_90 lose of a product of quantised x and FP8 weights
// (linear_sm90_fp8.h), for tests.
//
// An instruction multiplies exactly and adds 33 numbers, 32 products and the sum so far: it aligns
// them to the leading bit of the largest and drops what lies below 2^-kFp8SumBits of that (the sum
// keeps the same bits; Fp8Product.KeptBits measures the constant). So it errs by less than 33 units
// of 2^-kFp8SumBits of the largest of the 33 and of the result, and a block of 128 columns by the
// sum over its four instructions. Blocks are added in f32, which dot_bound() covers.
#pragma once
#include <algorithm>
#include <cmath>

#include "tests/oracle/fp8_sums.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {

using oracle::kFp8SumBits;

/// Bound of that error for one output: x and w of a token and a row, K long.
template <typename X, typename W>
double fp8_product_bound(const X* x, const W* w, int64_t cols) {
  double bound = 0;
  for (int64_t block = 0; block < cols; block += 128) {
    double sum = 0, error = 0;
    for (int64_t begin = block; begin < std::min(block + 128, cols); begin += 32) {
      double largest = std::abs(sum) + error;
      for (int64_t k = begin; k < std::min(begin + 32, cols); ++k) {
        const double product = static_cast<double>(x[k]) * static_cast<double>(w[k]);
        largest = std::max(largest, std::abs(product));
        sum += product;
      }
      largest = std::max(largest, std::abs(sum) + error);
      error += 34 * std::ldexp(largest, -kFp8SumBits);
    }
    bound += error;
  }
  return bound;
}

/// Does the candidate of "linear" compute FP8 weights x quantised input so?
inline bool adds_on_fp8_cores(const OpCandidate& candidate) {
  return candidate.platform == Platform::kCuda && candidate.name == "sm90_fp8";
}

}  // namespace dsv4::testing
