#include "tests/oracle/fp8_sums.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "tests/oracle/numbers.h"

namespace oracle {
namespace {

// Of zero and of subnormal doubles: below all others.
constexpr int kNoExponent = -2000;

// floor(log2(|value|)), from the bits.
int exponent_of(double value) {
  const auto field = static_cast<int>(std::bit_cast<uint64_t>(value) >> 52 & 0x7ff);
  return field == 0 ? kNoExponent : field - 1023;
}

double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Towards zero to a multiple of 2^unit.
double cut(double value, int unit) {
  return std::trunc(value * power_of_two(-unit)) * power_of_two(unit);
}

}  // namespace

double fp8_instruction(double sum, std::span<const double> x, std::span<const float> w) {
  int largest = exponent_of(sum);
  for (size_t k = 0; k < x.size(); ++k) {
    if (x[k] != 0 && w[k] != 0) {
      largest = std::max(largest, exponent_of(x[k]) + exponent_of(static_cast<double>(w[k])));
    }
  }
  if (largest == kNoExponent) return 0;
  const int unit = largest - kFp8SumBits;
  double total = cut(sum, unit);
  for (size_t k = 0; k < x.size(); ++k) total += cut(x[k] * static_cast<double>(w[k]), unit);
  return total == 0 ? 0 : cut(total, exponent_of(total) - kFp8SumBits);
}

double fp8_block(std::span<const double> x, std::span<const float> w) {
  double sum = 0;
  for (size_t k = 0; k < w.size(); k += kFp8InstructionCols) {
    const size_t count = std::min<size_t>(kFp8InstructionCols, w.size() - k);
    sum = fp8_instruction(sum, x.subspan(k, count), w.subspan(k, count));
  }
  return sum;
}

Matrix fp8_linear(const Matrix& x, const Weight& w, int groups) {
  const int64_t rank = w.rows / groups;
  Matrix out(x.rows, w.rows);
  for (int64_t r = 0; r < w.rows; ++r) {
    for (int64_t t = 0; t < x.rows; ++t) {
      const std::span<const double> in =
          x.row(t).subspan(static_cast<size_t>(r / rank * w.cols), static_cast<size_t>(w.cols));
      double total = 0;
      for (int64_t block = 0; block < w.cols; block += kFp8BlockCols) {
        const auto at = static_cast<size_t>(block);
        const auto count = static_cast<size_t>(std::min(kFp8BlockCols, w.cols - block));
        total = round_f32(total + fp8_block(in.subspan(at, count), w.row(r).subspan(at, count)));
      }
      out.row(t)[r] = total;
    }
  }
  return out;
}

}  // namespace oracle
