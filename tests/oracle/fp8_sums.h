// Sums on the FP8 tensor cores of sm_90, bit for bit: what Products::kFp8 means. NVIDIA does not
// document them; the rule is what Fp8Product.SumsAreTheModel (tests/ops) confirms on the hardware.
#pragma once
#include <span>

#include "tests/oracle/arrays.h"

namespace oracle {

/// Bits below the leading one that an instruction keeps.
constexpr int kFp8SumBits = 13;
constexpr int64_t kFp8InstructionCols = 32, kFp8BlockCols = 128;

/// One instruction: sum + x . w, at most 32 products of numbers that are E4M3 codes times a scale.
/// A product's exponent is that of x plus that of w, although it may be one more. All addends, the
/// sum so far included, are cut (towards zero) to multiples of 2^-13 of the power of two of the
/// largest exponent, added exactly, and the result is cut to 13 bits below its leading one.
double fp8_instruction(double sum, std::span<const double> x, std::span<const float> w);

/// A block of up to 128 columns: instructions in ascending order, from zero.
double fp8_block(std::span<const double> x, std::span<const float> w);

/// x w^T of such numbers, `groups` of them side by side (grouped_linear): blocks added in
/// ascending order, with one rounding to binary32 each.
Matrix fp8_linear(const Matrix& x, const Weight& w, int groups = 1);

}  // namespace oracle
