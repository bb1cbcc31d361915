#include "tests/testing/tolerance.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dsv4::testing {

double gamma(double roundings) {
  return roundings * kRoundoffF32 / (1 - roundings * kRoundoffF32);
}

double dot_bound(int64_t length, double magnitude) {
  return gamma(static_cast<double>(length)) * magnitude;
}

double e4m3_unit_bound(int64_t length, double magnitude) {
  return static_cast<double>((length + 31) / 32) * 33 * 0x1p-13 * magnitude;
}

double rounding_bound(DType dtype, double value, double slack) {
  if (dtype != DType::kF32 && dtype != DType::kBf16) return 0;
  const double largest = std::abs(value) + slack;
  const double roundoff = dtype == DType::kF32 ? kRoundoffF32 : kRoundoffBf16;
  // 2^-126 is the smallest normal of both: below it the spacing is constant.
  int exponent = 0;
  std::frexp(std::max(largest, 0x1p-126), &exponent);
  return std::ldexp(roundoff, exponent - 1);
}

void Comparison::add(std::initializer_list<int64_t> coordinates, double actual, double expected,
                     double bound) {
  ++count_;
  const double error = actual == expected ? 0 : std::abs(actual - expected);
  double ratio = error == 0 ? 0 : error / bound;
  const bool ok = bound >= 0 && error <= bound && std::isfinite(bound);
  if (!ok) {
    ++failures_;
    if (!(ratio > 1)) ratio = std::numeric_limits<double>::infinity();
  }
  if (ratio > worst_ratio_) {
    worst_ratio_ = ratio;
    coordinates_ = coordinates;
    actual_ = actual;
    expected_ = expected;
    bound_ = bound;
  }
}

::testing::AssertionResult Comparison::result() const {
  if (count_ == 0) return ::testing::AssertionFailure() << what_ << ": nothing was compared";
  auto out = failures_ == 0 ? ::testing::AssertionSuccess() : ::testing::AssertionFailure();
  out << what_ << ": " << failures_ << " of " << count_ << " elements out of bounds; worst at [";
  for (size_t i = 0; i < coordinates_.size(); ++i) out << (i == 0 ? "" : ", ") << coordinates_[i];
  return out << "]: got " << actual_ << ", expected " << expected_ << ", difference "
             << actual_ - expected_ << ", bound " << bound_ << " (" << worst_ratio_
             << " of the bound)";
}

::testing::AssertionResult close_to_largest(const std::string& what, std::span<const double> actual,
                                            std::span<const double> expected, double fraction) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << what << ": " << actual.size() << " elements, expected " << expected.size();
  }
  double largest = 0;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  Comparison comparison(what);
  for (size_t i = 0; i < actual.size(); ++i) {
    comparison.add({static_cast<int64_t>(i)}, actual[i], expected[i], fraction * largest);
  }
  return comparison.result();
}

}  // namespace dsv4::testing
